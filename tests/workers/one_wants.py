"""One rank wants gradients, the other does not: by requires_grad, no_grad or inference_mode, in
attention and in a mixer. Each is refused on both, at once; alike they go on."""

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


for call in (attention, state):
    for how in ("requires_grad", "no_grad", "inference"):
        group = dist.new_group()  # which has not been asked yet
        mine = rank == 0
        q = torch.randn(1, 16 // world, 2, 8, requires_grad=mine or how != "requires_grad")
        context = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(how)
        within = context() if context and not mine else contextlib.nullcontext()
        refused = pytest.raises(ValueError, match=r"ranks \[0\] of the group want gradients")
        with within, refused:
            call(q, group)
        with torch.no_grad():
            call(q, group)
        call(q.detach().clone().requires_grad_(), group).sum().backward()
print(f"rank {rank} is done", flush=True)
end_distributed()
