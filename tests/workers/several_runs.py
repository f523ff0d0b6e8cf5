"""Trains several configurations one after the other in one world: python starts are slow.

Arguments: a JSON file with a list of lists of overrides.
"""

import json
import os
import sys
from pathlib import Path

from ringattn.training import config
from ringattn.training.engines.deepspeed import DeepSpeed
from ringattn.training.job import prepare
from ringattn.training.launching.world import pick_device, start_distributed
from ringattn.training.main import train

device = pick_device("cpu")
start_distributed(device, 60, DeepSpeed())
for overrides in json.loads(Path(sys.argv[1]).read_text()):
    world = int(os.environ["WORLD_SIZE"])
    run = config.resolved(config.load(overrides), world)
    train(prepare(run, Path(run.run_dir), world), device)
