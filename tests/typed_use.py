"""Uses the public interface as a user would; tools/typecheck.py holds the types to it."""

from __future__ import annotations

from typing import assert_type

import torch
from torch import Tensor

import ringattn as ra
from ringattn.comm import VirtualWorld
from ringattn.context import Context, position_ids, shift_labels

mask = ra.masks.causal(1024) & ra.masks.documents([500, 524]) | ra.masks.sinks(1024, 4)
assert_type(mask, ra.masks.Mask)
assert_type(mask.area, int)
layout = ra.layouts.balanced(mask, 4)
plan = ra.make_plan(mask, layout, schedule="direct", ulysses=2, heads=8)
assert_type(plan, ra.Plan)
assert_type(plan.imbalance, float)
assert_type(plan.recv_tokens(0), int)
plans = ra.make_plans({"local": mask, "global": ra.masks.causal(1024)}, layout)
assert_type(plans, ra.LayerPlans)
assert_type(plans["local"], ra.Plan)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = ra.ring_attention(q, k, v, plan)
    assert_type(out, Tensor)
    both = ra.ring_attention(q, k, v, plan, return_lse=True)
    assert_type(both, tuple[Tensor, Tensor])
    flag: bool = plan.ulysses > 1
    assert_type(ra.ring_attention(q, k, v, plan, return_lse=flag), Tensor | tuple[Tensor, Tensor])
    return out


segments = ra.make_segments(ra.masks.documents([500, 524]), layout)
blocks = ra.make_blocks(mask, layout, 64)


def mix(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    state = ra.mixers.delta(q, k, v, beta, segments=segments)
    chosen = ra.mixers.moba(q, k, v, blocks=blocks, top_k=4)
    near = ra.mixers.union(q, [ra.mixers.Part(k, v, plan)])
    assert_type(state, Tensor)
    assert_type(chosen, Tensor)
    assert_type(near, Tensor)
    return state + chosen + near


def step(context: Context, tokens: Tensor) -> Tensor:
    labels = shift_labels(tokens, [500, 524])
    positions = position_ids(layout, context.cp_rank, [500, 524])
    assert_type(labels, Tensor)
    assert_type(positions, Tensor)
    return context.scaled_loss(labels.sum(), 1.0, accum=1)


results = VirtualWorld(4).run(lambda rank: torch.zeros(rank.rank))
