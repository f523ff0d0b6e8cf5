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
from ringattn.execution.wanted import check_wanted
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
    check_wanted(comm, x, weights)
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
        x = x.to(dtype)
        weights = None if weights is None else weights.to(dtype)
        tables = blocks.remember(
            ("pooling", comm.rank, x.device), lambda: _Tables(blocks, comm.rank, x.device)
        )
        parts = _tokens(x, weights, how)
        for table in tables.own:
            parts = _merged(parts, how, table)
        parts = moved(parts, blocks.move, comm)
        for table in tables.owned:
            parts = _merged(parts, how, table)
        value = parts[0]  # [batch, blocks, heads, slots, dim]
        if how == "mean":
            value = value / tables.counts.to(dtype)[:, None, None, None]
    return value.transpose(2, 3).flatten(1, 2)


class _Tables:
    """Of a rank: which tokens make its pieces (``own``), and which pieces its blocks (``owned``):
    tables ``[groups, most]``, applied one after the other, and the tokens of each block."""

    def __init__(self, blocks: Blocks, rank: int, device: torch.device) -> None:
        pieces = blocks.pieces
        own = pieces.rank == rank
        first, size = pieces.first[own], (pieces.stop - pieces.first)[own]
        mine = np.flatnonzero(blocks.owner == rank)
        held = pieces.block[blocks.owner[pieces.block] == rank]
        each = np.bincount(held, minlength=len(blocks))[mine]
        self.own, self.owned = (
            [torch.from_numpy(table).to(device) for table in tables]
            for tables in (
                _tables(first, size, blocks.layout.count(rank)),
                _tables(np.cumsum(each) - each, each, len(held)),
            )
        )
        self.counts = torch.from_numpy((blocks.stops - blocks.starts)[mine]).to(device)


def _tables(starts: np.ndarray, sizes: np.ndarray, rows: int) -> list[np.ndarray]:
    """How groups of rows, ``sizes`` from ``starts`` on, are merged: at most ``_CHUNK`` at a time,
    so that a long one beside many short ones is not paid for by all. One past ``rows`` stands for
    no row."""
    tables = []
    while True:
        each = -(-sizes // _CHUNK)
        within = np.arange(each.sum()) - np.repeat(np.cumsum(each) - each, each)
        first = np.repeat(starts, each) + within * _CHUNK
        size = np.minimum(np.repeat(sizes, each) - within * _CHUNK, _CHUNK)
        along = np.arange(int(size.max(initial=1)))
        tables.append(np.where(along < size[:, None], first[:, None] + along, rows))
        if (each <= 1).all():
            return tables
        starts, sizes, rows = np.cumsum(each) - each, each, int(each.sum())


def _taken(x: torch.Tensor, index: torch.Tensor, empty: float = 0.0) -> torch.Tensor:
    """``[batch, groups, most, ...]`` of ``[batch, rows, ...]``."""
    return torch.cat([x, x.new_full((x.shape[0], 1, *x.shape[2:]), empty)], 1)[:, index]


def _tokens(x: torch.Tensor, weights: torch.Tensor | None, how: How) -> list[torch.Tensor]:
    """What is merged of single tokens: their values ``[batch, tokens, heads, 1, dim]``; with the
    weights ``[batch, tokens, heads, slots]`` that the first merge multiplies by; of a maximum, how
    many have it."""
    values = x[:, :, :, None]
    if how == "max":
        return [values, torch.ones_like(values)]
    return [values] if weights is None else [values, weights]


def _merged(parts: list[torch.Tensor], how: How, index: torch.Tensor) -> list[torch.Tensor]:
    """Of groups of rows. A maximum that several have is the mean of theirs, so that its gradient
    is shared evenly however they are split."""
    if how == "max":
        values, times = _taken(parts[0], index, -torch.inf), _taken(parts[1], index)
        times = times * (values == values.amax(2, keepdim=True)).detach()
        total = times.sum(2)
        values = values.masked_fill(values == -torch.inf, 0)
        return [(values * times).sum(2) / total, total]
    values = _taken(parts[0], index)
    if how == "mean":
        return [values.sum(2)]
    if how == "sum":
        if len(parts) == 1:
            return [values.sum(2)]
        weights = _taken(parts[1], index)
        return [torch.einsum("bcthd,bcthm->bchmd", values[:, :, :, :, 0], weights)]
    if parts[1].dim() == 5:  # log-sum-exps of what has been merged
        lse = _taken(parts[1], index, -torch.inf)
        total = lse.logsumexp(2)
        return [(values * (lse - total[:, :, None]).exp()).sum(2), total]
    logits = _taken(parts[1], index, -torch.inf)
    total = logits.logsumexp(2)
    shares = (logits - total[:, :, None]).exp()
    return [torch.einsum("bcthd,bcthm->bchmd", values[:, :, :, :, 0], shares), total[..., None]]


def gather(x: torch.Tensor, layout: Layout, group: Any = None) -> torch.Tensor:
    """All rows, in order, on every rank: ``[batch, n, ...]`` of each rank's ``[batch, local rows,
    ...]``: for the few summaries that every rank looks through. Gradients are summed at the owner.
    Collective over ``group``."""
    return _Gather.apply(x, layout, connect(group))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layout: Layout, comm: Comm) -> torch.Tensor:
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
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
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
