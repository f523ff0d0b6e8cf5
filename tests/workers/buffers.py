"""In bf16, frequencies of RoPE stay as they are, whichever engine casts the weights.

Argument: the folder of a model.
"""

import sys
from pathlib import Path

import torch

from ringattn.context import Context
from ringattn.hf.describe import config_of
from ringattn.hf.trained import SplitModel
from ringattn.models.memory import Memory
from ringattn.training.engines import Parts
from ringattn.training.engines.deepspeed import DeepSpeed
from ringattn.training.engines.fsdp import FSDP
from ringattn.training.launching.world import start_distributed
from ringattn.training.optimizer import Optimizer

start_distributed(torch.device("cpu"), 60, DeepSpeed())
config = config_of(Path(sys.argv[1]))
context = Context.create(1, torch.device("cpu"))


def make_model():
    return SplitModel(config, Memory(), ["all"] * config.num_hidden_layers)


want = {name: buffer.clone() for name, buffer in make_model().named_buffers()}
assert want
for engine in (DeepSpeed(zero_stage=1), DeepSpeed(zero_stage=3), FSDP()):
    parts = Parts(make_model, 1000, Optimizer(), context, "bf16", 1, 1)
    built = engine.build(parts)
    (model,) = (m for m in built.root.modules() if isinstance(m, SplitModel))
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, want[name]), (engine, name, buffer.dtype)
    built.close()
