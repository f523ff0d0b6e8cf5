"""hydra config groups; train.py composes config.yaml from here."""
