"""Pre-train a decoder on sequences split over ranks.

    torchrun --nproc-per-node 2 train.py model=small seq_len=16384 parallel.cp=2

Keys and their defaults: configs/config.yaml, or --help.
"""

import sys
from pathlib import Path

# The checkout's own folders must not shadow installed packages (its kernels/ would).
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

if __name__ == "__main__":
    from ringattn.training.main import main

    sys.exit(main(sys.argv[1:]))
