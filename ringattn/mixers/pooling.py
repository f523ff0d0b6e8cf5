"""Summaries of blocks: reductions of tokens, wherever in their block they lie.

Each rank reduces what it has of a block; these *pieces* go to the block's owner and are merged
there. What is merged is a sum, a maximum, or the (value, log-sum-exp) of a softmax, so the order of
the ranks does not matter but for rounding.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from ringattn.execution.carriers import Comm, connect
from ringattn.execution.exchange import take
from ringattn.kernels import state_dtype
from ringattn.mixers.moving import moved
from ringattn.planning.blocks import Blocks
from ringattn.planning.layouts import Layout

How = Literal["mean", "max", "sum", "softmax"]
_CHUNK = 64  # tokens that are reduced at once


def pool(
    x: torch.Tensor,
    blocks: Blocks,
    group: Any = None,
    how: How = "mean",
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Summaries of the blocks that this rank owns, in the order of ``blocks.summaries(slots)``.

    x ``[batch, local tokens, heads, dim]``. ``how``: "mean" and "max" over a block's tokens;
    "sum", weighted by ``weights``; "softmax": by their softmax over the block. ``weights``
    ``[batch, local tokens, heads, slots]`` make ``slots`` summaries of each block. Returns
    ``[batch, own summaries, heads, dim]`` in float32 (float64 for float64). Differentiable, of the
    weights too. Collective over ``group``. Raises ValueError for shapes that do not fit.
    """
    comm = connect(group)
    tokens = blocks.layout.count(comm.rank)
    if x.dim() != 4 or x.shape[1] != tokens or comm.world != blocks.world:
        raise ValueError(
            f"pool: x must be [batch, {tokens}, heads, dim] on rank {comm.rank} of {blocks.world}, "
            f"got {list(x.shape)} on one of {comm.world}"
        )
    if (weights is not None) != (how in ("sum", "softmax")):
        raise ValueError(
            f"pool: how={how!r} " + ("needs weights" if weights is None else "has none")
        )
    if weights is not None and (weights.dim() != 4 or weights.shape[:3] != x.shape[:3]):
        raise ValueError(
            f"pool: weights must be [batch, tokens, heads, slots] of x {list(x.shape)}, got "
            f"{list(weights.shape)}"
        )
    with torch.autocast(x.device.type, enabled=False):
        dtype = state_dtype(x.dtype)
        x, weights = x.to(dtype), None if weights is None else weights.to(dtype)
        tables = blocks.remember(
            ("pooling", comm.rank, x.device), lambda: _Tables(blocks, comm.rank, x.device)
        )
        parts = _merged(_chunks(x, weights, how, tables.chunks), how, tables.pieces)
        parts = moved(parts, blocks.move, comm)
        value = _merged(parts, how, tables.owned)[0]  # [batch, blocks, heads, slots, dim]
        if how == "mean":
            value = value / tables.counts.to(dtype)[:, None, None, None]
    return value.transpose(2, 3).flatten(1, 2)


class _Tables:
    """Indices of a rank: tokens of chunks, chunks of pieces, pieces of the blocks that it owns;
    each ``[groups, most]``, one past the end where there are fewer."""

    def __init__(self, blocks: Blocks, rank: int, device: torch.device) -> None:
        pieces = blocks.pieces
        own = pieces.rank == rank
        first, size = pieces.first[own], (pieces.stop - pieces.first)[own]
        each = -(-size // _CHUNK)
        within = np.arange(each.sum()) - np.repeat(np.cumsum(each) - each, each)
        starts = np.repeat(first, each) + within * _CHUNK
        sizes = np.minimum(np.repeat(size, each) - within * _CHUNK, _CHUNK)
        mine = np.flatnonzero(blocks.owner == rank)
        held = pieces.block[blocks.owner[pieces.block] == rank]
        of_each = np.bincount(held, minlength=len(blocks))[mine]
        tables = (
            _padded(starts, sizes, blocks.layout.count(rank)),
            _padded(np.cumsum(each) - each, each, int(each.sum())),
            _padded(np.cumsum(of_each) - of_each, of_each, len(held)),
            (blocks.stops - blocks.starts)[mine],
        )
        self.chunks, self.pieces, self.owned, self.counts = (
            torch.from_numpy(table).to(device) for table in tables
        )


def _padded(starts: np.ndarray, sizes: np.ndarray, none: int) -> np.ndarray:
    """``[groups, most]``: start, start + 1, ... of each group, then ``none``."""
    along = np.arange(int(sizes.max(initial=1)))
    return np.where(along < sizes[:, None], starts[:, None] + along, none)


def _taken(x: torch.Tensor, index: torch.Tensor, empty: float = 0.0) -> torch.Tensor:
    """``[batch, groups, most, ...]`` of ``[batch, rows, ...]``."""
    return torch.cat([x, x.new_full((x.shape[0], 1, *x.shape[2:]), empty)], 1)[:, index]


def _chunks(
    x: torch.Tensor, weights: torch.Tensor | None, how: How, index: torch.Tensor
) -> list[torch.Tensor]:
    """Of chunks of tokens: their values ``[batch, chunks, heads, slots, dim]``, and for a softmax
    their log-sum-exp ``[..., 1]``."""
    if how == "max":
        return [_taken(x, index, -torch.inf).amax(2)[:, :, :, None]]
    values = _taken(x, index)
    if how == "mean":
        return [values.sum(2)[:, :, :, None]]
    if how == "sum":
        return [torch.einsum("bcthd,bcthm->bchmd", values, _taken(weights, index))]
    logits = _taken(weights, index, -torch.inf)
    lse = logits.logsumexp(2)
    shares = (logits - lse[:, :, None]).exp()
    return [torch.einsum("bcthd,bcthm->bchmd", values, shares), lse[..., None]]


def _merged(parts: list[torch.Tensor], how: How, index: torch.Tensor) -> list[torch.Tensor]:
    """Of groups of what :func:`_chunks` gives."""
    if how == "max":
        return [_taken(parts[0], index, -torch.inf).amax(2)]
    if how != "softmax":
        return [_taken(parts[0], index).sum(2)]
    values, lse = _taken(parts[0], index), _taken(parts[1], index, -torch.inf)
    total = lse.logsumexp(2)
    return [(values * (lse - total[:, :, None]).exp()).sum(2), total]


def gather(x: torch.Tensor, layout: Layout, group: Any = None) -> torch.Tensor:
    """All rows, in order, on every rank: ``[batch, n, ...]`` of each rank's ``[batch, local rows,
    ...]``: for the few summaries that every rank looks through. Gradients are summed at the owner.
    Collective over ``group``."""
    return _Gather.apply(x, layout, connect(group))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layout: Layout, comm: Comm):
        ctx.layout, ctx.comm = layout, comm
        parts = [x.new_empty(x.shape[0], layout.count(r), *x.shape[2:]) for r in layout.ranks]
        parts[comm.rank] = x.contiguous()
        others = [peer for peer in layout.ranks if peer != comm.rank]
        sends = [(parts[comm.rank], peer) for peer in others if x.shape[1]]
        recvs = [(parts[peer], peer) for peer in others if layout.count(peer)]
        comm.start(sends, recvs, "summaries of all ranks").wait()
        return layout.unshard(parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        layout, comm = ctx.layout, ctx.comm
        own = layout.shard(grad, comm.rank)
        others = [peer for peer in layout.ranks if peer != comm.rank]
        sends = [
            (take(grad, layout.runs[peer]).contiguous(), peer)
            for peer in others
            if layout.count(peer)
        ]
        back = [(torch.empty_like(own), peer) for peer in others] if own.shape[1] else []
        comm.start(sends, back, "gradients of gathered summaries").wait()
        for part, _ in back:
            own = own + part
        return own, None, None
