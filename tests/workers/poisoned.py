"""Trains several configurations; in step 3 of each, rank 1's loss is not a number.

Arguments: a JSON file with a list of lists of overrides.
"""

import json
import os
import sys
from pathlib import Path

import torch

from ringattn.models.decoder import Decoder
from ringattn.training import config
from ringattn.training.engines.deepspeed import DeepSpeed
from ringattn.training.job import prepare
from ringattn.training.launching.world import pick_device, start_distributed
from ringattn.training.main import train

device = pick_device("cpu")
start_distributed(device, 60, DeepSpeed())
calls, forward = [], Decoder.forward


def poisoned(self, tokens, positions, attend, labels=None):
    result = forward(self, tokens, positions, attend, labels)
    if labels is None or not torch.is_grad_enabled():
        return result
    calls.append(1)
    bad = len(calls) == 3 and int(os.environ["RANK"]) == 1
    # Alone, an infinite loss has a finite gradient.
    kind = float("inf") if os.environ["POISON"] == "inf" else float("nan")
    loss = result[0] + kind if kind == float("inf") else result[0] * kind
    return (loss if bad else result[0], *result[1:])


Decoder.forward = poisoned
for overrides in json.loads(Path(sys.argv[1]).read_text()):
    calls.clear()
    world = int(os.environ["WORLD_SIZE"])
    run = config.resolved(config.load(overrides), world)
    train(prepare(run, Path(run.run_dir), world), device)
