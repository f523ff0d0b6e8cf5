"""All ranks refuse, and rank 0 is late ("late"); or rank 0 finds nothing wrong ("alone")."""

import os
import sys
import time

from ringattn import refusal

if sys.argv[1] == "late":
    refusal.SILENCE_S = 300
    time.sleep(0.5 * (os.environ["RANK"] == "0"))
else:
    refusal.SILENCE_S = 0.2
    time.sleep(600 * (os.environ["RANK"] == "0"))
sys.exit(refusal.refuse("train.py: no"))
