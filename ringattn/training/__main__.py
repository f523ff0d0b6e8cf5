"""``torchrun ... -m ringattn.training KEY=VALUE...``: train.py where there is no checkout."""

import sys

from ringattn.training.main import main

sys.exit(main(sys.argv[1:]))
