"""Heads split over groups of ranks around a mixer: inside, each group is as if it were one rank,
with all of its tokens and a share of the heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ringattn.execution.carriers import Comm, Message, Pending
from ringattn.execution.exchange import gather_heads, scatter_heads
from ringattn.planning.head_split import HeadSplit, check_degree, split
from ringattn.planning.layouts import Layout


class Groups:
    """The groups of ``degree`` neighbouring ranks as the ranks of a carrier: this one exchanges
    with the members of other groups that have the same heads."""

    def __init__(self, comm: Comm, degree: int) -> None:
        self.comm, self.degree = comm, degree
        self.rank, self.member = divmod(comm.rank, degree)
        self.world = comm.world // degree

    def start(self, sends: Sequence[Message], recvs: Sequence[Message], label: str) -> Pending:
        """See :class:`ringattn.execution.carriers.Comm`."""
        outside = (
            [(x, peer * self.degree + self.member) for x, peer in some] for some in (sends, recvs)
        )
        return self.comm.start(*outside, label)


class Shared:
    """How tensors on ``layout`` and their heads, ``heads`` of queries, go into groups of ``degree``
    ranks and back. Collective; gradients go the other way. Raises ValueError for an illegal
    degree."""

    def __init__(self, layout: Layout, degree: int, heads: int, comm: Comm) -> None:
        check_degree(degree, comm.world, heads)
        self.layout, self.degree, self.heads, self.comm = layout, degree, heads, comm
        self.split = split(comm.rank, degree, layout, layout)
        self.groups = Groups(comm, degree)

    def into(self, *tensors: tuple[torch.Tensor, Layout]) -> list[torch.Tensor]:
        """``[batch, tokens, heads, dim]`` of this rank, each with its layout, as ``[batch, the
        group's tokens, own heads, dim]``. K/V heads that several members read are replicated."""
        given = []
        for x, layout in tensors:
            own = self.split if layout is self.layout else self._of(layout)
            given.append((own.q_rows, [self._heads(m, x.shape[2]) for m in range(self.degree)]))
        return list(_Into.apply(given, self.split, self.comm, *(x for x, _ in tensors)))

    def back(self, x: torch.Tensor) -> torch.Tensor:
        """``[batch, the group's tokens, own heads, dim]`` as ``[batch, tokens, heads, dim]``."""
        heads = [self._heads(m, self.heads) for m in range(self.degree)]
        return _Back.apply(self.split.q_rows, heads, self.heads, self.split, self.comm, x)

    def own(self, of_heads: torch.Tensor) -> torch.Tensor:
        """Of ``[heads, ...]``, alike on all ranks, those of the own heads."""
        heads = self.split.q_heads(self.split.member, self.heads)
        return of_heads[heads.start : heads.stop]

    def _of(self, layout: Layout) -> HeadSplit:
        return split(self.comm.rank, self.degree, layout, layout)

    def _heads(self, member: int, heads: int) -> Sequence[int]:
        if heads == self.heads:
            return self.split.q_heads(member, heads)
        return self.split.kv_heads(member, self.heads, heads)


class _Into(torch.autograd.Function):
    @staticmethod
    def forward(ctx, given, split, comm, *tensors):
        ctx.given, ctx.split, ctx.comm = given, split, comm
        ctx.heads = [x.shape[2] for x in tensors]
        each = [(x, *one) for x, one in zip(tensors, given, strict=True)]
        inside = scatter_heads(each, split, comm, "heads of a mixer")
        ctx.mark_non_differentiable(*(x for x in inside if not x.is_floating_point()))
        ctx.wanted = [x.is_floating_point() for x in inside]
        return tuple(inside)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        each = [
            # Replicated heads are summed: in float32.
            (x.float() if sum(map(len, one[1])) > heads and x.itemsize < 4 else x, *one, heads)
            for x, one, heads, wanted in zip(grads, ctx.given, ctx.heads, ctx.wanted, strict=True)
            if wanted
        ]
        back = iter(gather_heads(each, ctx.split, ctx.comm, "gradients of heads"))
        given = zip(grads, ctx.wanted, strict=True)
        return None, None, None, *(next(back).to(x.dtype) if want else None for x, want in given)


class _Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, heads, total, split, comm, x):
        ctx.given = rows, heads, split, comm
        return gather_heads([(x, rows, heads, total)], split, comm, "heads of a mixer's out")[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rows, heads, split, comm = ctx.given
        (back,) = scatter_heads([(grad, rows, heads)], split, comm, "gradients of out")
        return None, None, None, None, None, back


def split_heads(
    mixer: Callable[..., Any], blocks: Any, comm: Comm, q: torch.Tensor, *others: torch.Tensor
) -> torch.Tensor:
    """``mixer(blocks, comm, q, *others)`` where ``blocks.ulysses`` ranks share the heads: each
    group as one rank. All tensors are ``[batch, tokens, heads or kv_heads, dim]`` on its tokens."""
    if blocks.ulysses == 1:
        return mixer(blocks, comm, q, *others)
    shared = Shared(blocks.layout, blocks.ulysses, q.shape[2], comm)
    inside = shared.into(*((x, blocks.layout) for x in (q, *others)))
    return shared.back(mixer(blocks.of_groups, shared.groups, *inside))
