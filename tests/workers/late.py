"""Ranks that come at other times, twice over the same store as after a restart by torchrun."""

import os
import time

import torch
import torch.distributed as dist

from ringattn.training.engines.fsdp import FSDP
from ringattn.training.launching.world import start_distributed

rank = int(os.environ["RANK"])
for turn in range(2):
    time.sleep(0.3 * ((rank + 2 * turn) % int(os.environ["WORLD_SIZE"])))
    start_distributed(torch.device("cpu"), 20, FSDP())
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total == dist.get_world_size()
    dist.destroy_process_group()
