"""Compiled attention on real ranks equals eager attention, for plans that change."""

from datetime import timedelta

import torch
import torch.distributed as dist

import ringattn as ra
from ringattn.execution.carriers import end_distributed

dist.init_process_group("gloo", timeout=timedelta(seconds=300))
rank, world = dist.get_rank(), dist.get_world_size()
group = dist.new_group(list(range(world)))
torch.set_num_threads(1)
torch._dynamo.config.capture_dynamic_output_shape_ops = True  # torch 2.9 wants it for Ulysses


def attention(q, k, v, plan):
    return ra.ring_attention(q * 2, k, v, plan, group=group).sin()


compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
n = 31
generator = torch.Generator().manual_seed(0)
whole = [torch.randn(2, n, h, 16, generator=generator) for h in (4, 2, 2, 4)]
for mask in (ra.masks.causal(n), ra.masks.sliding_window(n, 7), ra.masks.full(n)):
    for ulysses in (1, 2):
        plan = ra.make_plan(mask, ra.layouts.zigzag(n, world), "ring", ulysses)
        *own, dout = (plan.layout.shard(x, rank) for x in whole)
        results = []
        for run in (attention, compiled):
            leaves = [x.clone().requires_grad_() for x in own]
            out = run(*leaves, plan)
            results.append([out, *torch.autograd.grad(out, leaves, dout)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), (mask, ulysses)
end_distributed()
