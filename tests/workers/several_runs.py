"""Trains several configurations one after the other in one world: python starts are slow.

Arguments: a JSON file with a list of lists of overrides.
"""

import json
import os
import sys
from pathlib import Path

from ringattn.training import settings
from ringattn.training.engine import pick_device, start_distributed
from ringattn.training.job import prepare
from ringattn.training.main import run

device = pick_device("cpu")
start_distributed(device, 60, "deepspeed")
for overrides in json.loads(Path(sys.argv[1]).read_text()):
    config = settings.load(overrides)
    world = int(os.environ["WORLD_SIZE"])
    settings.check(config, world)
    run(prepare(config, Path(config.run_dir), world), device)
