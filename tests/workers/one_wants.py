"""One rank wants gradients, the other does not, in attention and in a mixer: refused on both, at
the first call, and later at one of the next; alike they go on, with gradients and without."""

import contextlib
import os

import pytest
import torch
import torch.distributed as dist

import ringattn as ra
from ringattn.execution.carriers import end_distributed
from ringattn.mixers import linear

dist.init_process_group("gloo")
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
mask, layout = ra.masks.causal(16), ra.layouts.contiguous(16, world)
plan, segments = ra.make_plan(mask, layout), ra.make_segments(mask, layout)


def attention(q, group):
    return ra.ring_attention(q, q, q, plan, group=group)


def state(q, group):
    return linear(q, q, q, segments=segments, group=group)


refused = r"ranks \[0\] of the group want gradients, ranks \[1\] none"
shape = (1, 16 // world, 2, 8)
for call in (attention, state):
    group = dist.new_group()  # which has not been asked yet
    with pytest.raises(ValueError, match=refused):
        call(torch.randn(shape, requires_grad=rank == 0), group)
    for within in (torch.no_grad, torch.inference_mode, contextlib.nullcontext):
        with within():
            call(torch.randn(shape), group)
    call(torch.randn(shape, requires_grad=True), group).sum().backward()
    for _ in range(2):
        call(torch.randn(shape), group)
    with pytest.raises(ValueError, match=refused):  # the 8th
        call(torch.randn(shape, requires_grad=rank == 0), group)
print(f"rank {rank} is done", flush=True)
end_distributed()
