"""Attention within buckets: tokens of one bucket are brought together, wherever they lie.

Every rank computes the buckets of its tokens; the numbers are exchanged, so that all agree on the
order by bucket. Tokens move to where they are in that order, attend within chunks of their bucket
(their own chunk and the one before, tokens that are not later), and their results move back.

Chunks begin anew in each bucket. Were they cut across the whole order, as Reformer's are, a later
token of another bucket would shift the cuts, and so change what earlier ones attend.

``kernel`` and ``scale`` are those of :func:`ringattn.ring_attention`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from einops import rearrange

from ringattn.execution.carriers import Comm, connect
from ringattn.mixers.chunks import in_float32
from ringattn.mixers.heads import split_heads
from ringattn.mixers.pooling import gather
from ringattn.mixers.union import Part, Rows, union
from ringattn.planning.blocks import Blocks
from ringattn.planning.layouts import contiguous
from ringattn.planning.masks import Mask
from ringattn.planning.plan import Plan
from ringattn.planning.runs import Run
from ringattn.planning.slices import Slice


@in_float32
def hashed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    buckets: torch.Tensor,
    *,
    blocks: Blocks,
    itself: bool = False,
    group: Any = None,
    kernel: str = "auto",
    scale: float | None = None,
) -> torch.Tensor:
    """Causal attention within buckets, in chunks of ``blocks.size`` tokens of a bucket: Reformer
    (Kitaev et al. 2020, arXiv:2001.04451) with :func:`lsh`, routing attention (Roy et al. 2020,
    arXiv:2003.05997) with :func:`nearest`.

    buckets int64 ``[batch, local tokens, heads, rounds]``; of several rounds all keys are under one
    softmax, and one that is found twice counts twice. ``itself``: whether a token attends itself;
    where it does not, the first of a bucket does all the same, having no other. q ``[batch, local
    tokens, heads, head_dim]``, k and v with kv_heads. Returns what q is like. Collective over
    ``group``.
    """
    if buckets.shape[:3] != q.shape[:3] or buckets.dtype != torch.int64:
        raise ValueError(
            f"hashed: buckets must be int64 [batch, tokens, heads, rounds] of q {list(q.shape)}, "
            f"got {buckets.dtype} {list(buckets.shape)}"
        )

    def mixer(
        blocks: Blocks, comm: Comm, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        buckets: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        wide = q.shape[2] // k.shape[2]
        both = torch.cat([k, v], -1).repeat_interleave(wide, 2)
        parts = []
        for one in buckets.unbind(-1):
            plan, sorting = by_bucket(one, blocks, itself, comm)
            there = _Sorted.apply(both, sorting)
            keys, values = there.split([k.shape[3], v.shape[3]], 3)
            parts.append(Part(keys, values, plan, rows=sorting))
        return union(q, parts, comm, kernel, scale)

    return split_heads(mixer, blocks, connect(group), q, k, v, buckets)


@in_float32
def lsh(x: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """Buckets by random rotations, of ``[batch, tokens, heads, dim]`` and ``[rounds, dim, buckets /
    2]``, alike on all ranks: where ``[x R; -x R]`` is largest, ``[batch, tokens, heads, rounds]``.
    """
    turned = torch.einsum("bthd,rdc->bthrc", x.to(rotations.dtype), rotations)
    return torch.cat([turned, -turned], -1).argmax(-1)


@in_float32
def nearest(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Buckets of ``x`` ``[batch, tokens, heads, dim]`` by the one of ``centroids`` ``[heads,
    buckets, dim]`` with the largest product, one round: int64 ``[batch, tokens, heads, 1]``."""
    return torch.einsum("bthd,hcd->bthc", x.to(centroids.dtype), centroids).argmax(-1, keepdim=True)


class Sorting(Rows):
    """Tokens to where they lie in the order by bucket, and back: see
    :class:`ringattn.mixers.union.Rows`. ``sends[peer]`` are rows of ``[batch, heads, tokens]``,
    flat, ``recvs[peer]`` rows of the own part of the order."""

    def __init__(
        self, sends: list[torch.Tensor], recvs: list[torch.Tensor], comm: Comm, shared: int
    ) -> None:
        super().__init__(torch.cat(recvs), shared)  # so many rows
        self.sends, self.recvs, self.comm = sends, recvs, comm

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """Of ``[batch, tokens, heads, dim]``: ``[1, own rows of the order, 1, dim]``."""
        flat = rearrange(x, "b t h d -> (b h t) d")
        return self._moved(flat, self.sends, self.recvs, len(self.index))[None, :, None]

    def take_lse(self, lse: torch.Tensor) -> torch.Tensor:
        """Of ``[batch, heads, tokens]``: ``[1, 1, own rows of the order]``."""
        flat = lse.flatten()[:, None]
        return self._moved(flat, self.sends, self.recvs, len(self.index)).mT[None]

    def turns(
        self, x: torch.Tensor, lse: torch.Tensor, like: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The inverse of both."""
        both = torch.cat([x[0, :, 0], lse[0].mT.to(x.dtype)], 1)
        batch, tokens, heads = like.shape[:3]
        home = self._moved(both, self.recvs, self.sends, batch * tokens * heads)
        home = rearrange(home, "(b h t) d -> b t h d", b=batch, h=heads)
        yield home[..., :-1], rearrange(home[..., -1], "b t h -> b h t")

    def summed(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`take`."""
        batch, tokens, heads = like.shape[:3]
        home = self._moved(x[0, :, 0], self.recvs, self.sends, batch * tokens * heads)
        return rearrange(home, "(b h t) d -> b t h d", b=batch, h=heads)

    def _moved(
        self, x: torch.Tensor, out: list[torch.Tensor], into: list[torch.Tensor], rows: int
    ) -> torch.Tensor:
        """Rows ``out[peer]`` of ``[rows, dim]`` to each peer, into rows ``into[peer]`` there."""
        comm = self.comm
        result = x.new_empty(rows, x.shape[1])
        others = [peer for peer in range(comm.world) if peer != comm.rank]
        sends = [(x[out[peer]], peer) for peer in others if len(out[peer])]
        recvs = [
            (x.new_empty(len(into[peer]), x.shape[1]), peer) for peer in others if len(into[peer])
        ]
        pending = comm.start(sends, recvs, "tokens by bucket")
        result[into[comm.rank]] = x[out[comm.rank]]
        pending.wait()
        for part, peer in recvs:
            result[into[peer]] = part
        return result


class _Sorted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sorting: Sorting) -> torch.Tensor:
        ctx.sorting, ctx.like = sorting, x.new_empty(0).expand(*x.shape[:3], 0)
        return sorting.take(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.sorting.summed(grad, ctx.like), None


@torch.no_grad()
def by_bucket(
    buckets: torch.Tensor, blocks: Blocks, itself: bool, group: Any = None
) -> tuple[Plan, Sorting]:
    """(the plan in the order by bucket, how tokens get there) of ``[batch, local tokens, heads]``.
    Collective."""
    comm, device = connect(group), buckets.device
    layout = blocks.layout
    whole = gather(buckets.int(), layout, comm)  # [batch, n, heads]
    everyone: np.ndarray = rearrange(whole, "b n h -> (b h) n").cpu().numpy()
    copies, n = everyone.shape
    document = np.searchsorted(np.cumsum(blocks.lengths), np.arange(n), side="right")
    # By document, bucket and position, each copy by itself.
    order = np.stack([np.lexsort((np.arange(n), row, document)) for row in everyone])
    owner, row = np.zeros(n, np.int64), np.zeros(n, np.int64)
    for rank in layout.ranks:
        at = layout.positions(rank)
        owner[at], row[at] = rank, np.arange(len(at))
    there = contiguous(n * copies, comm.world)
    cuts = [there.runs[r][0].start if there.runs[r] else 0 for r in there.ranks]
    target = np.searchsorted(
        np.cumsum([there.count(r) for r in there.ranks]), np.arange(n * copies), side="right"
    )
    source = owner[order].reshape(-1)
    local = np.array([layout.count(r) for r in layout.ranks])[source]
    local = np.repeat(np.arange(copies), n) * local + row[order].reshape(-1)
    sends = [local[(source == comm.rank) & (target == peer)] for peer in range(comm.world)]
    mine = np.flatnonzero(target == comm.rank)
    recvs = [mine[source[mine] == peer] - cuts[comm.rank] for peer in range(comm.world)]
    mask = _mask(np.take_along_axis(everyone, order, 1), document, blocks.size, itself)
    plan = Plan(mask, there, there, "direct", 1, comm.world)
    out, into = ([torch.from_numpy(x).to(device) for x in some] for some in (sends, recvs))
    return plan, Sorting(out, into, comm, buckets.shape[2])


def _mask(buckets: np.ndarray, document: np.ndarray, chunk: int, itself: bool) -> Mask:
    """Of ``[copies, n]`` buckets in order, and the documents in order."""
    copies, n = buckets.shape
    at = np.arange(n)
    new = np.zeros((copies, n), bool)
    new[:, :1] = True
    new[:, 1:] = (np.diff(buckets) != 0) | (np.diff(document) != 0)
    copy, begins = np.nonzero(new)
    first = np.zeros((copies, n), np.int64)
    first[copy, begins] = begins
    first = np.maximum.accumulate(first, 1)  # of its bucket
    cut = (at - first) % chunk == 0
    parts = []
    for c in range(copies):
        starts = np.flatnonzero(cut[c])
        stops = np.append(starts[1:], n)
        low = np.maximum(first[c][starts], starts - chunk)
        alone = new[c][starts]
        for a, b, k, begin in zip(*(x.tolist() for x in (starts, stops, low, alone)), strict=True):
            q, keys = Run(c * n + a, c * n + b), Run(c * n + k, c * n + b)
            parts.append(Slice.make(q, keys, None, 0 if itself else -1))
            if begin and not itself:
                parts.append(Slice.make(Run(q.start, q.start + 1), Run(q.start, q.start + 1)))
    return Mask(tuple(part for part in parts if part), copies * n, copies * n)
