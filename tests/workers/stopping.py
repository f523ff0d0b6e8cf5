"""Trains a configuration; at one moment rank 1 gets a signal.

Arguments: where (forward, backward, evaluation), of which call, a JSON file with a list of lists of
overrides, of which the moment is in the first, and the signal (SIGTERM).
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from ringattn.models.decoder import Decoder
from ringattn.training import config, stopping
from ringattn.training.engines.deepspeed import DeepSpeed
from ringattn.training.job import prepare
from ringattn.training.launching.world import pick_device, start_distributed
from ringattn.training.main import train

where, call, listing = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
number = getattr(signal, [*sys.argv, "SIGTERM"][4])
stopping.LONG_S = -1.0  # all steps are long
device = pick_device("cpu")
start_distributed(device, 60, DeepSpeed())
calls, forward = {"forward": 0, "backward": 0, "evaluation": 0}, Decoder.forward


def reach(kind):
    calls[kind] += 1
    if kind == where and calls[kind] == call and os.environ["RANK"] == "1":
        os.kill(os.getpid(), number)


def counting(self, tokens, positions, attend, labels=None):
    if labels is not None:
        reach("forward" if torch.is_grad_enabled() else "evaluation")
    out = forward(self, tokens, positions, attend, labels)
    if labels is not None and torch.is_grad_enabled():
        loss = out if isinstance(out, torch.Tensor) else out[0]
        loss.register_hook(lambda grad: reach("backward"))
    return out


Decoder.forward = counting
for overrides in json.loads(listing.read_text()):
    world = int(os.environ["WORLD_SIZE"])
    run = config.resolved(config.load(overrides), world)
    train(prepare(run, Path(run.run_dir), world), device)
