"""Rank 1 never takes part, or once only: the error on rank 0 must say what it waited for."""

from datetime import timedelta

import torch
import torch.distributed as dist

import ringattn as ra
from ringattn.execution.carriers import end_distributed

dist.init_process_group("gloo", timeout=timedelta(seconds=300))
rank = dist.get_rank()
plan = ra.make_plan(ra.masks.causal(10), ra.layouts.zigzag(10, 2))
q, k, v = torch.randn(3, 1, plan.layout.count(rank), 2, 8).unbind()
for together in (0, 2):
    ring = dist.new_group(timeout=timedelta(seconds=1))
    for _ in range(together):
        ra.ring_attention(q, k, v, plan, group=ring)
    if rank == 0:
        try:
            ra.ring_attention(q, k, v, plan, group=ring)
        except RuntimeError as error:
            print("said:", error)
    dist.barrier()
end_distributed()
