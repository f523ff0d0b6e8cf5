"""Every mixer with chosen or summarised keys: its inputs, its split version and its definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

import ringattn as ra
from ringattn import mixers
from ringattn.execution.carriers import connect
from ringattn.mixers import features, naive_attention

HEADS, KV_HEADS, DIM, SIZE = 4, 2, 8, 6


@dataclass(frozen=True)
class Family:
    """``make(draw, n)``: named inputs, float64; those in ``shared`` are alike on all ranks, those
    in ``fixed`` have no gradient. ``split(inputs, blocks, group)`` and ``whole(inputs, lengths)``.
    """

    make: Callable
    split: Callable
    whole: Callable
    shared: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    causal: bool = True
    ulysses: bool = True
    size: int = SIZE


def _qkv(draw, n):
    def normal(heads):
        return torch.randn(2, n, heads, DIM, generator=draw, dtype=torch.float64)

    return {"q": normal(HEADS), "k": normal(KV_HEADS), "v": normal(KV_HEADS)}


def _with(**more):
    """q, k, v and more, each of a function of (draw, n)."""

    def make(draw, n):
        return _qkv(draw, n) | {name: of(draw, n) for name, of in more.items()}

    return make


def _normal(*shape):
    """With -1 in place of the tokens."""
    return lambda draw, n: torch.randn(
        *(n if size == -1 else size for size in shape), generator=draw, dtype=torch.float64
    )


def _uniform(*shape):
    return lambda draw, n: torch.rand(
        *(n if size == -1 else size for size in shape), generator=draw, dtype=torch.float64
    )


def _qkv_of(x):
    return x["q"], x["k"], x["v"]


def _pooled(sizes, near, how="mean", causal=True):
    def split(x, blocks, group):
        levels = [blocks.of(size) for size in sizes]
        return mixers.pooled(
            *_qkv_of(x), blocks=levels, near=near, how=how, weights=x.get("weights"),
            causal=causal, group=group,
        )  # fmt: skip

    def whole(x, lengths):
        return naive_attention.pooled(
            *_qkv_of(x), sizes, near, how, x.get("weights"), causal, lengths
        )

    more = {"weights": _normal(2, -1, KV_HEADS, 1)} if how == "softmax" else {}
    return Family(_with(**more), split, whole, causal=causal, size=sizes[0])


def _past(draw, n):
    """Two blocks of 1 token each for each K/V head and token: itself, or one before it, or none."""
    back = torch.randint(0, 4, (2, n, KV_HEADS, 1), generator=draw)
    ids = torch.cat([torch.arange(n)[None, :, None, None] - back, torch.full_like(back, -1)], -1)
    return torch.where(ids < 0, -1, ids)


def _selected(x, blocks, group):
    """Of ids by position in one sequence, those in the own document."""
    at = torch.from_numpy(blocks.layout.positions(connect(group).rank))
    begins = torch.from_numpy(blocks.begins[blocks.document])
    own = begins[at][None, :, None, None]
    ids = torch.where(x["ids"] < own, -1, x["ids"])
    return mixers.selected(*_qkv_of(x), ids, blocks=blocks, own=False, group=group)


def _selected_whole(x, lengths):
    begins = torch.cat([torch.full((n,), sum(lengths[:i])) for i, n in enumerate(lengths)])
    ids = torch.where(x["ids"] < begins[None, :, None, None], -1, x["ids"])
    return naive_attention.selected(*_qkv_of(x), ids, 1, False, lengths)


def _picks(first, own):
    """Of each head two earlier blocks of the document, where there are: [1, tokens, heads, 2]."""
    back = torch.tensor([[1, 3], [2, 3], [1, 2], [4, 1]])
    ids = torch.from_numpy(own)[:, None, None] - back
    return torch.where(ids < torch.from_numpy(first)[:, None, None], -1, ids)[None]


def _selected_blocks(x, blocks, group):
    at = blocks.layout.positions(connect(group).rank)
    own = np.searchsorted(blocks.starts, at, side="right") - 1
    ids = _picks(blocks.firsts[blocks.document[own]], own).expand(2, -1, -1, -1)
    return mixers.selected(*_qkv_of(x), ids, blocks=blocks, group=group)


def _selected_blocks_whole(x, lengths):
    first, own, count = [], [], 0
    for n in lengths:
        first += [count] * n
        own += [count + t // SIZE for t in range(n)]
        count += -(-n // SIZE)
    ids = _picks(np.array(first), np.array(own)).expand(2, -1, -1, -1)
    return naive_attention.selected(*_qkv_of(x), ids, SIZE, True, lengths)


def _performer(x):
    projection = torch.randn(
        48, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(x["q"].dtype)
    k = x["k"].repeat_interleave(HEADS // KV_HEADS, 2)
    return (features.performer(y * DIM**-0.25, projection) for y in (x["q"], k))


def _buckets(x):
    rotations = torch.randn(2, DIM, 3, generator=torch.Generator().manual_seed(2))
    return mixers.lsh(x["q"].detach(), rotations.to(x["q"].dtype))


FAMILIES = {
    "window and summaries": _pooled([SIZE], 1),
    "two levels": _pooled([3, 12], 2),
    "maxima": _pooled([SIZE], 2, "max"),
    "learned summaries": _pooled([SIZE], 1, "softmax"),
    "transient globals": _pooled([SIZE], 2, causal=False),
    "moba": Family(
        _qkv,
        lambda x, blocks, group: mixers.moba(*_qkv_of(x), blocks=blocks, top_k=3, group=group),
        lambda x, lengths: naive_attention.moba(*_qkv_of(x), SIZE, 3, lengths),
    ),
    "nsa": Family(
        _with(gates=_uniform(2, -1, HEADS, 3)),
        lambda x, blocks, group: mixers.nsa(
            *_qkv_of(x), x["gates"], blocks=blocks, compressed=blocks.of(4, 2), top_k=5, window=7,
            group=group,
        ),
        lambda x, lengths: naive_attention.nsa(
            *_qkv_of(x), x["gates"], SIZE, (4, 2), 5, 7, lengths
        ),
    ),
    "dsa": Family(
        _with(index_q=_normal(2, -1, 3, 4), index_k=_normal(2, -1, 4), weights=_uniform(2, -1, 3)),
        lambda x, blocks, group: mixers.dsa(
            *_qkv_of(x), x["index_q"], x["index_k"], x["weights"], blocks=blocks, top_k=5,
            group=group,
        ),
        lambda x, lengths: naive_attention.dsa(
            *_qkv_of(x), x["index_q"], x["index_k"], x["weights"], 5, lengths
        ),
        fixed=("index_q", "index_k", "weights"),
        ulysses=False,
        size=1,
    ),
    "selected": Family(
        _with(ids=_past), _selected, _selected_whole, fixed=("ids",), ulysses=False, size=1
    ),
    "selected blocks": Family(_qkv, _selected_blocks, _selected_blocks_whole),
    "linformer": Family(
        _with(project_k=_normal(64, 3), project_v=_normal(64, 3)),
        lambda x, blocks, group: mixers.linformer(
            *_qkv_of(x), x["project_k"], x["project_v"], blocks=blocks, group=group
        ),
        lambda x, lengths: naive_attention.linformer(
            *_qkv_of(x), x["project_k"], x["project_v"], lengths
        ),
        ("project_k", "project_v"),
        causal=False,
    ),
    "luna": Family(
        _with(memory=_normal(KV_HEADS, 3, DIM)),
        lambda x, blocks, group: mixers.luna(
            *_qkv_of(x), x["memory"], blocks=blocks, group=group
        ),
        lambda x, lengths: naive_attention.luna(*_qkv_of(x), x["memory"], lengths),
        ("memory",),
        causal=False,
    ),
    "nystrom": Family(
        _qkv,
        lambda x, blocks, group: mixers.nystrom(*_qkv_of(x), blocks=blocks, group=group),
        lambda x, lengths: naive_attention.nystrom(*_qkv_of(x), SIZE, 6, lengths),
        causal=False,
    ),
    "scatterbrain": Family(
        _qkv,
        lambda x, blocks, group: mixers.scatterbrain(
            *_qkv_of(x), *_performer(x), blocks=blocks, group=group
        ),
        lambda x, lengths: naive_attention.scatterbrain(
            *_qkv_of(x), *_performer(x), SIZE, lengths
        ),
    ),
    "hashed": Family(
        _qkv,
        lambda x, blocks, group: mixers.hashed(
            *_qkv_of(x), _buckets(x), blocks=blocks, group=group
        ),
        lambda x, lengths: naive_attention.hashed(
            *_qkv_of(x), _buckets(x), SIZE, lengths=lengths
        ),
    ),
    "clusters": Family(
        _with(centroids=_normal(HEADS, 4, DIM)),
        lambda x, blocks, group: mixers.hashed(
            *_qkv_of(x), mixers.nearest(x["q"].detach(), x["centroids"]), blocks=blocks,
            itself=True, group=group,
        ),
        lambda x, lengths: naive_attention.hashed(
            *_qkv_of(x), mixers.nearest(x["q"].detach(), x["centroids"]), SIZE, True, lengths
        ),
        ("centroids",),
        ("centroids",),
    ),
    "adaptive span": Family(
        _with(spans=lambda draw, n: torch.tensor([0.25, 4.625, 4.25, 50.5], dtype=torch.float64)),
        lambda x, blocks, group: mixers.adaptive_span(
            *_qkv_of(x), x["spans"], blocks=blocks, ramp=3, group=group
        ),
        lambda x, lengths: naive_attention.adaptive_span(*_qkv_of(x), x["spans"], 3, lengths),
        ("spans",),
        ulysses=False,
    ),
}  # fmt: skip


def blocks_of(family: Family, layout, lengths, ulysses=1):
    return ra.make_blocks(ra.masks.documents(lengths), layout, family.size, None, ulysses)


def inputs_of(family: Family, n: int, seed: int):
    """(inputs, the gradient of what comes out)."""
    draw = torch.Generator().manual_seed(seed)
    inputs = family.make(draw, n)
    return inputs, torch.randn(2, n, HEADS, DIM, generator=draw, dtype=torch.float64)


def whole(family: Family, inputs, d_out, lengths):
    """(out, gradients by name) of the definition, in float64."""
    own = _leaves(family, inputs, torch.float64, lambda x: x)
    out = family.whole(own, lengths)
    out.backward(d_out)
    return out.detach(), {name: x.grad for name, x in own.items() if x.requires_grad}


def split(family: Family, inputs, d_out, blocks, rank, group, dtype=torch.float64):
    """The same of what a rank has."""

    def own_part(name, x):
        return x if name in family.shared else blocks.layout.shard(x, rank)

    own = {name: _leaf(family, name, own_part(name, x), dtype) for name, x in inputs.items()}
    out = family.split(own, blocks, group)
    out.backward(blocks.layout.shard(d_out, rank).to(dtype))
    return out.detach(), {
        name: torch.zeros_like(x) if x.grad is None else x.grad
        for name, x in own.items()
        if x.requires_grad
    }


def _leaves(family, inputs, dtype, part):
    return {name: _leaf(family, name, part(x), dtype) for name, x in inputs.items()}


def _leaf(family, name, x, dtype):
    x = x.to(dtype).clone() if x.is_floating_point() else x
    return x.requires_grad_() if name not in family.fixed else x
