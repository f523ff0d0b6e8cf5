"""``python -m ringattn`` is the console script ``ringattn``, so that torchrun can start it."""

import sys

from ringattn.cli import main

if __name__ == "__main__":
    sys.exit(main())
