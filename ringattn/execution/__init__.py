"""What walks plans: carriers, exchanges, the executor, the operator."""
