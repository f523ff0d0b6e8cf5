"""One softmax over several sets of keys, and over other mixers beside them."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ringattn as ra
from ringattn import mixers
from ringattn.execution.carriers import VirtualWorld

from . import oracle


@settings(max_examples=25)
@given(
    world=st.sampled_from([1, 2, 4]), ulysses=st.sampled_from([1, 2]), seed=st.integers(0, 2**31),
    n=st.integers(4, 30), softcap=st.sampled_from([None, 2.0]), sinks=st.booleans(),
    weight=st.sampled_from([0.0, 1.5, "heads"]),
)  # fmt: skip
def test_a_union_is_one_softmax(world, ulysses, seed, n, softcap, sinks, weight):
    """Two sets of keys, one of other tokens; sinks and softcap; its log-sum-exp."""
    ulysses = 1 if world % ulysses else ulysses
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    others = n // 3 + 1
    window = ra.masks.sliding_window(n, 3)
    some = ra.masks.from_slices([((0, n), (0, others), None, 0)], n, others)
    layout, keys = ra.layouts.zigzag(n, world), ra.layouts.contiguous(others, world)
    plans = [
        ra.make_plan(window, layout, "ring", ulysses),
        ra.make_plan(some, layout, "direct", ulysses, key_layout=keys),
    ]
    q, k, v = normal(2, n, 4, 8), normal(2, n, 2, 8), normal(2, n, 2, 6)
    k2, v2, d_out = normal(2, others, 2, 8), normal(2, others, 2, 6), normal(2, n, 4, 6)
    sink = normal(4) if sinks else None
    log = normal(4) if weight == "heads" else weight
    shared = [] if sink is None else [sink]
    leaves = [x.clone().requires_grad_() for x in (q, k, v, k2, v2, *shared)]
    scores = torch.einsum(
        "bqhd,bkhd->bhqk", leaves[0],
        torch.cat([leaves[1], leaves[3]], 1).repeat_interleave(2, 2),
    ) * 0.3  # fmt: skip
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    added = torch.zeros(4, n + others, dtype=torch.float64)
    added[:, n:] = log[:, None] if weight == "heads" else log
    allowed = torch.from_numpy(np.concatenate([window.to_dense(), some.to_dense()], 1))
    scores = (scores + added[:, None]).masked_fill(~allowed, -torch.inf)
    if sink is not None:
        scores = torch.cat([scores, leaves[5][None, :, None, None].expand(2, 4, n, 1)], -1)
    lse = scores.logsumexp(-1)
    values = torch.cat([leaves[2], leaves[4]], 1).repeat_interleave(2, 2)
    want = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1)[..., : n + others], values)
    grads = torch.autograd.grad(want, leaves, d_out)

    def work(rank):
        own = [layout.shard(x, rank.rank).requires_grad_() for x in (q, k, v)]
        own += [keys.shard(x, rank.rank).requires_grad_() for x in (k2, v2)]
        own += [x.clone().requires_grad_() for x in shared]
        parts = [
            mixers.Part(own[1], own[2], plans[0]),
            mixers.Part(own[3], own[4], plans[1], log),
        ]
        out, lse = mixers.union(
            own[0],
            parts,
            rank,
            scale=0.3,
            return_lse=True,
            softcap=softcap,
            sinks=own[5] if shared else None,
        )
        return lse, out.detach(), *torch.autograd.grad(out, own, layout.shard(d_out, rank.rank))

    found = VirtualWorld(world, 60).run(work)
    assert oracle.error(layout.unshard([x[0] for x in found], 2), lse.detach()) < 1e-12
    for i, wanted in enumerate((want.detach(), *grads)):
        parts = [x[i + 1] for x in found]
        own = keys if i in (4, 5) else layout
        got = sum(parts) if i == 6 else own.unshard(parts)
        assert oracle.error(got, wanted) < 1e-12, i


def test_half_precision_states_are_float32():
    """bf16: as far from float64 as one kernel call over all keys is, whatever the ranks."""
    n = 256
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 16, generator=draw).bfloat16() for _ in range(3))
    near = ra.masks.sliding_window(n, 32)
    far = ra.masks.causal(n) - near
    want = oracle.attention(q, k, v, ra.masks.causal(n).to_dense(), torch.ones_like(q))[0]
    errors = []
    for world in (1, 4):
        layout = ra.layouts.zigzag(n, world)
        plans = [ra.make_plan(mask, layout, "direct") for mask in (near, far)]

        def work(rank, layout=layout, plans=plans):
            own = [layout.shard(x, rank.rank) for x in (q, k, v)]
            return mixers.union(own[0], [mixers.Part(*own[1:], plan) for plan in plans], rank)

        errors.append(oracle.error(layout.unshard(VirtualWorld(world, 60).run(work)), want))
    one = ra.ring_attention(q, k, v, ra.make_plan(ra.masks.causal(n), ra.layouts.contiguous(n, 1)))
    assert max(errors) < 1.1 * oracle.error(one, want) + 1e-4, errors


def test_linear_attention_under_one_normaliser_with_a_window():
    """combine: the sum of both mixers' weights times values over the sum of their weights."""
    n, window = 40, 6
    draw = torch.Generator().manual_seed(0)
    q, k, v, d_out = (torch.randn(1, n, 2, 8, generator=draw).double() for _ in range(4))
    layout, mask = ra.layouts.zigzag(n, 3), ra.masks.sliding_window(n, window)
    segments = ra.make_segments(ra.masks.causal(n), layout)
    plan = ra.make_plan(mask, layout, "direct")
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    scores = torch.einsum("bqhd,bkhd->bhqk", *leaves[:2]) * 8**-0.5
    features = torch.einsum("bqhd,bkhd->bhqk", *(x.exp() for x in leaves[:2]))
    weights = scores.exp() * torch.from_numpy(mask.to_dense()) + features.tril()
    want = torch.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdim=True), leaves[2])
    grads = torch.autograd.grad(want, leaves, d_out)

    def work(rank):
        own = [layout.shard(x, rank.rank).requires_grad_() for x in (q, k, v)]
        state = mixers.State(*mixers.linear(
            own[0].exp(), own[1].exp(), own[2], segments=segments, group=rank, scale=1.0,
            normalize=True, return_lse=True,
        ))  # fmt: skip
        out = mixers.combine(own[0], [mixers.Part(*own[1:], plan)], [state], rank)
        return out.detach(), *torch.autograd.grad(out, own, layout.shard(d_out, rank.rank))

    found = VirtualWorld(3, 60).run(work)
    for i, wanted in enumerate((want.detach(), *grads)):  # linear attention is float32 inside
        assert oracle.error(layout.unshard([x[i] for x in found]), wanted) < 1e-5
