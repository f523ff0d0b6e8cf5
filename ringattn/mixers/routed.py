"""Attention whose queries choose blocks of keys, by scores that are known at run time only.

Every rank scores the queries that it has and chooses for them. The counts of what was chosen are
exchanged, so that all ranks make the same plan, and then the blocks that somebody chose. Queries
are gathered by the block that they chose, so a block kernel's work is full rectangles, of each head
by itself. Where scores are equal the earlier block is chosen. Nothing of the choice is
differentiated.

``kernel`` and ``scale`` are those of :func:`ringattn.ring_attention`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from einops import rearrange

from ringattn.execution.carriers import Comm, connect
from ringattn.kernels import state_dtype
from ringattn.mixers.chunks import in_float32
from ringattn.mixers.heads import split_heads
from ringattn.mixers.pooling import gather, pool
from ringattn.mixers.union import Part, Rows, union
from ringattn.planning.blocks import Blocks
from ringattn.planning.layouts import contiguous
from ringattn.planning.routing import ChoicePlan

_SCORES = 2**24  # that exist at a time


@in_float32
def moba(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    blocks: Blocks,
    top_k: int,
    group: Any = None,
    kernel: str = "auto",
    scale: float | None = None,
) -> torch.Tensor:
    """Mixture of block attention (Lu et al. 2025, arXiv:2502.13189): each query of each head
    attends its own block, causally, and of the earlier blocks of its document the ``top_k - 1``
    whose mean key has the largest product with it; under one softmax.

    q ``[batch, local tokens, heads, head_dim]``, k and v with kv_heads. Returns what q is like.
    Collective over ``group``. Raises ValueError for a top_k below 1.
    """
    _check_top_k("moba", top_k)

    def mixer(
        blocks: Blocks, comm: Comm, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        parts = [Part(k, v, blocks.plan(blocks.near(1)))]
        if top_k > 1:
            parts.append(chosen_part(q, k, v, moba_choice(q, k, blocks, top_k, comm), blocks, comm))
        return union(q, parts, comm, kernel, scale)

    return split_heads(mixer, blocks, connect(group), q, k, v)


@torch.no_grad()
@in_float32
def moba_choice(
    q: torch.Tensor, k: torch.Tensor, blocks: Blocks, top_k: int, group: Any = None
) -> torch.Tensor:
    """The blocks that :func:`moba` chooses besides the own one: ``[batch, tokens, heads, top_k -
    1]``, as numbers of ``blocks``, -1 where there are no more. Collective."""
    comm = connect(group)
    # Means in float64: the ranks that a block lies on change their last bit otherwise.
    means = pool(k.double(), blocks, comm).to(state_dtype(q.dtype))
    means = gather(means, blocks.summaries(), comm)
    first, own, _ = _seen(blocks, comm, q.device)
    chosen = []
    for rows, part in _tiles(q, len(blocks)):
        scores = _products(part, means)
        chosen.append(_best(scores, first[rows], own[rows], top_k - 1))
    return torch.cat(chosen, 1) if chosen else first.new_empty(*q.shape[:3], top_k - 1)


@in_float32
def nsa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: torch.Tensor,
    *,
    blocks: Blocks,
    compressed: Blocks | None = None,
    top_k: int = 16,
    window: int = 512,
    group: Any = None,
    kernel: str = "auto",
    scale: float | None = None,
) -> torch.Tensor:
    """Native sparse attention (Yuan et al. 2025, arXiv:2502.11089): three attentions, each with a
    softmax of its own, added by their ``gates``: over the means of all ``compressed`` blocks that
    have ended (default: ``blocks``; they may overlap); over ``top_k`` of ``blocks``, which all
    heads of a K/V head choose together; and over a ``window`` of tokens.

    Of these three are always the own block, the one before it and the document's first; the others
    are those on which most of the first attention lies. q ``[batch, local tokens, heads,
    head_dim]``, k and v with kv_heads, gates ``[batch, local tokens, heads, 3]`` in that order.
    Returns what q is like. Collective over ``group``. Raises ValueError for a top_k below 3, and
    where K/V heads would be shared by ranks.
    """
    _check_top_k("nsa", top_k, 3)
    if k.shape[2] % blocks.ulysses:
        raise ValueError(
            f"nsa: heads of one K/V head choose together, so ulysses={blocks.ulysses} has to "
            f"divide the {k.shape[2]} K/V heads"
        )
    of = (blocks if compressed is None else compressed).size
    every = (blocks if compressed is None else compressed).stride

    def mixer(
        blocks: Blocks, comm: Comm, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        gates: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        small = blocks.of(of, every)
        # In float64: the ranks that a block lies on change the last bit otherwise, and so choices.
        means = pool(torch.cat([k, v], -1).double(), small, comm)
        means = means.to(state_dtype(q.dtype)).to(q.dtype)
        k_mean, v_mean = means.split([k.shape[3], v.shape[3]], 3)
        options: Any = (comm, kernel, scale)
        seen = Part(k_mean, v_mean, small.plan(small.ended(), small.summaries()))
        first, lse = union(q, [seen], *options, return_lse=True)
        chosen = nsa_choice(q, k_mean, lse, blocks, small, top_k, comm, scale)
        parts = [Part(k, v, blocks.plan(blocks.near(1)))]
        parts.append(chosen_part(q, k, v, chosen, blocks, comm))
        second = union(q, parts, *options)
        third = union(q, [Part(k, v, blocks.plan(blocks.window(window)))], *options)
        near, choice, last = (gate[..., None] for gate in gates.unbind(-1))
        return (first * near + second * choice + third * last).to(q.dtype)

    return split_heads(mixer, blocks, connect(group), q, k, v, gates)


@torch.no_grad()
@in_float32
def nsa_choice(
    q: torch.Tensor,
    k_mean: torch.Tensor,
    lse: torch.Tensor,
    blocks: Blocks,
    compressed: Blocks,
    top_k: int,
    group: Any = None,
    scale: float | None = None,
) -> torch.Tensor:
    """The blocks that :func:`nsa` chooses besides the own one: ``[batch, tokens, kv_heads, top_k -
    1]``, -1 where there are no more. ``k_mean``: of this rank's compressed blocks; ``lse``
    ``[batch, heads, tokens]`` of the attention over them. Collective."""
    comm = connect(group)
    dtype, kv_heads = state_dtype(q.dtype), k_mean.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    means = gather(k_mean, compressed.summaries(), comm).to(dtype)
    first, own, at = _seen(blocks, comm, q.device)
    ended, begun = _ended(compressed, at, q.device)
    index, share = _overlaps(blocks, compressed, q.device)
    chosen = []
    for rows, part in _tiles(q, max(len(compressed), index.numel())):
        scores = _products(part, means) * scale - lse[:, :, rows].mT[..., None]
        numbers = torch.arange(len(compressed), device=q.device)
        unseen = (numbers < begun[rows, None]) | (numbers >= ended[rows, None])
        weights = scores.masked_fill(unseen[:, None], -torch.inf).exp()
        weights = rearrange(weights, "b t (h g) c -> b t h g c", h=kv_heads).sum(3)
        weights = torch.cat([weights, weights.new_zeros(*weights.shape[:3], 1)], -1)
        scores = (weights[..., index] * share).sum(-1)
        numbers = torch.arange(len(blocks), device=q.device)
        forced = (numbers == first[rows, None]) | (numbers == own[rows, None] - 1)
        scores = scores.masked_fill(forced[:, None], torch.inf)
        chosen.append(_best(scores, first[rows], own[rows], top_k - 1))
    if chosen:
        return torch.cat(chosen, 1)
    return first.new_empty(*q.shape[:2], kv_heads, top_k - 1)


@in_float32
def selected(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ids: torch.Tensor,
    *,
    blocks: Blocks,
    own: bool = True,
    group: Any = None,
    kernel: str = "auto",
    scale: float | None = None,
) -> torch.Tensor:
    """Attention over blocks that somebody has chosen: ``ids`` ``[batch, local tokens, shared,
    picks]``, numbers of ``blocks`` or -1, where ``shared`` (a multiple of kv_heads that divides
    heads) groups of heads each choose for themselves; and with ``own`` over the token's own block,
    causally. A block that is chosen twice counts twice.

    All else as in :func:`moba`. Raises ValueError for a block of another document, or one that has
    not ended with the token or before it: on all ranks.
    """
    heads, kv_heads, shared = q.shape[2], k.shape[2], ids.shape[2]
    fits = ids.shape[:2] == q.shape[:2] and shared % kv_heads == 0 and heads % shared == 0
    if not fits or ids.dtype != torch.int64:
        raise ValueError(
            f"selected: ids must be int64 [batch, tokens, shared, picks] of q {list(q.shape)}, "
            f"with {kv_heads} K/V heads dividing shared; got {ids.dtype} {list(ids.shape)}"
        )

    def mixer(
        blocks: Blocks, comm: Comm, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        ids: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        parts = [Part(k, v, blocks.plan(blocks.near(1)))] if own else []
        parts.append(chosen_part(q, k, v, ids, blocks, comm, check=True))
        return union(q, parts, comm, kernel, scale)

    return split_heads(mixer, blocks, connect(group), q, k, v, ids)


@in_float32
def dsa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index_q: torch.Tensor,
    index_k: torch.Tensor,
    index_weights: torch.Tensor,
    *,
    blocks: Blocks,
    top_k: int,
    group: Any = None,
    kernel: str = "auto",
    scale: float | None = None,
) -> torch.Tensor:
    """DeepSeek's sparse attention (DeepSeek-V3.2, arXiv:2512.02556): each token attends the
    ``top_k`` tokens of its document up to itself that a small indexer scores highest, the same for
    all heads: ``sum_j index_weights_j relu(index_q_j . index_k)``.

    index_q ``[batch, local tokens, index heads, index dim]``, index_k ``[batch, local tokens, index
    dim]``, index_weights ``[batch, local tokens, index heads]``; ``blocks`` of size 1. All else as
    in :func:`moba`. No gradient reaches the indexer, which has a loss of its own. The plan has a
    slice for each token that a rank chose: right, and for short sequences.
    """
    _check_top_k("dsa", top_k)
    if blocks.size != 1 or blocks.ulysses > 1:
        raise ValueError(
            f"dsa: tokens are chosen, so blocks of size 1 and ulysses=1, got {blocks.size} and "
            f"{blocks.ulysses}"
        )
    comm = connect(group)
    with torch.no_grad():
        dtype = state_dtype(q.dtype)
        keys = gather(index_k, blocks.layout, comm).to(dtype)
        first, _, at = _seen(blocks, comm, q.device)
        chosen = []
        for rows, part in _tiles(index_q, keys.shape[1]):
            products = torch.einsum("bthd,bcd->bthc", part.to(dtype), keys).relu()
            scores = (products * index_weights[:, rows, :, None].to(dtype)).sum(2, keepdim=True)
            chosen.append(_best(scores, first[rows], at[rows] + 1, top_k))
        ids = torch.cat(chosen, 1) if chosen else first.new_empty(*q.shape[:2], 1, top_k)
        ids = ids.expand(-1, -1, k.shape[2], -1)
    return selected(q, k, v, ids, blocks=blocks, own=False, group=comm, kernel=kernel, scale=scale)


def chosen_part(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ids: torch.Tensor,
    blocks: Blocks,
    group: Any = None,
    check: bool = False,
) -> Part:
    """The part of a union over the blocks that ``ids`` ``[batch, tokens, shared, picks]`` name (see
    :func:`selected`), with the plan that all ranks agree on. Collective."""
    comm = connect(group)
    batch, tokens, shared = ids.shape[:3]
    kv_heads = k.shape[2]
    device = q.device
    flat = rearrange(ids, "b t s p -> b s t p")
    b, s, t, _ = (x.flatten() for x in torch.meshgrid(
        *(torch.arange(size, device=device) for size in flat.shape), indexing="ij"
    ))  # fmt: skip
    flat = flat.flatten()
    wrong = torch.zeros((), dtype=torch.bool, device=device)
    if check and len(flat):
        wrong = _not_ended(flat, t, blocks, comm).any()
    kept = flat >= 0
    where = (b * kv_heads + s // (shared // kv_heads)) * len(blocks) + flat
    where, rows = where[kept], ((b * shared + s) * tokens + t)[kept]
    order = torch.argsort(where, stable=True)
    size = batch * kv_heads * len(blocks)
    counts = torch.bincount(where.clamp(0, max(0, size - 1)), minlength=size)
    counts = torch.cat([counts, wrong[None].long()]).int()  # every rank has to know
    all_counts = gather(counts[None], contiguous(comm.world * len(counts), comm.world), comm)
    everyone: np.ndarray = all_counts.view(comm.world, -1).cpu().numpy()
    if everyone[:, -1].any():
        raise ValueError(
            "selected: a chosen block is of another document, does not exist, or has not ended "
            f"with its token (on ranks {np.flatnonzero(everyone[:, -1]).tolist()})"
        )
    plan = ChoicePlan(blocks, everyone[:, :-1].reshape(comm.world, -1, len(blocks)))
    k, v = (rearrange(x, "b t h d -> 1 (b h t) 1 d") for x in (k, v))
    return Part(k, v, plan, rows=Rows(rows[order], shared))


def _check_top_k(name: str, top_k: int, least: int = 1) -> None:
    if top_k < least:
        raise ValueError(f"{name}: top_k must be at least {least}, got {top_k}")


def _seen(
    blocks: Blocks, comm: Comm, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each local token: the first block of its document, its own block, and its position."""

    def work() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        at = blocks.layout.positions(comm.rank)
        own = np.searchsorted(blocks.starts, at, side="right") - 1
        first = blocks.firsts[blocks.document[own]]
        on_device = [torch.from_numpy(x).to(device) for x in (first, own, at)]
        return on_device[0], on_device[1], on_device[2]

    return blocks.remember(("seen", comm.rank, device), work)


def _ended(
    blocks: Blocks, at: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of tokens at these positions: one after the last block that has ended, and the first of their
    document."""
    starts, stops = (torch.from_numpy(x).to(device) for x in (blocks.starts, blocks.stops))
    own = torch.searchsorted(starts, at, right=True) - 1
    first = torch.from_numpy(blocks.firsts[blocks.document]).to(device)[own]
    ended = torch.searchsorted(stops, at + 1, right=True)
    return torch.minimum(ended, own + 1), first


def _overlaps(
    blocks: Blocks, small: Blocks, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each block the small ones that share tokens with it ``[blocks, most]``, one past the end
    where there are fewer, and how many strides of tokens they share."""

    def work() -> tuple[torch.Tensor, torch.Tensor]:
        low = np.searchsorted(small.stops, blocks.starts, side="right")
        high = np.searchsorted(small.starts, blocks.stops - 1, side="right")
        along = np.arange(int((high - low).max(initial=1)))
        index = low[:, None] + along
        inside = index < high[:, None]
        index = np.where(inside, index, len(small))
        known = np.minimum(index, len(small) - 1)
        begin = np.maximum(small.starts[known], blocks.starts[:, None])
        end = np.minimum(small.stops[known], blocks.stops[:, None])
        share = np.where(inside, end - begin, 0) / small.stride
        return torch.from_numpy(index).to(device), torch.from_numpy(share).float().to(device)

    return blocks.remember(("overlaps", small.size, small.stride, device), work)


def _not_ended(ids: torch.Tensor, token: torch.Tensor, blocks: Blocks, comm: Comm) -> torch.Tensor:
    """Which of ``ids`` may not be chosen by the local token beside them."""
    first, _, at = _seen(blocks, comm, ids.device)
    stops = torch.from_numpy(blocks.stops).to(ids.device)
    known = ids.clamp(0, len(blocks) - 1)
    late = (stops[known] > at[token] + 1) | (ids < first[token]) | (ids >= len(blocks))
    return late & (ids >= 0) | (ids < -1)


def _tiles(q: torch.Tensor, columns: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Queries in parts of which all scores can exist at once."""
    each = max(1, _SCORES // max(1, q.shape[0] * q.shape[2] * columns))
    for at in range(0, q.shape[1], each):
        rows = slice(at, at + each)
        yield rows, q[:, rows]


def _products(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """``[batch, tokens, heads, keys]`` of ``[batch, tokens, heads, dim]`` and ``[batch, keys,
    kv_heads, dim]``."""
    grouped = rearrange(q.to(keys.dtype), "b t (h g) d -> b t h g d", h=keys.shape[2])
    return torch.einsum("bthgd,bchd->bthgc", grouped, keys).flatten(2, 3)


def _best(
    scores: torch.Tensor, first: torch.Tensor, stop: torch.Tensor, count: int
) -> torch.Tensor:
    """``[batch, tokens, heads, count]``: the highest of the scores ``[..., blocks]`` from ``first``
    up to ``stop`` of each token; of equals the first; -1 where there are no more."""
    numbers = torch.arange(scores.shape[-1], device=scores.device)
    outside = (numbers < first[:, None]) | (numbers >= stop[:, None])
    scores = scores.masked_fill(outside[:, None], -torch.inf)
    best = torch.sort(scores, dim=-1, descending=True, stable=True)
    ids = best.indices[..., :count].masked_fill(best.values[..., :count] == -torch.inf, -1)
    missing = count - ids.shape[-1]
    return torch.nn.functional.pad(ids, (0, missing), value=-1) if missing > 0 else ids
