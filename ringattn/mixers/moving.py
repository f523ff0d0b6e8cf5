"""Tokens to another layout and back, where that weighs less than summaries of many segments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch

from ringattn.execution.carriers import Comm
from ringattn.execution.exchange import Inbox, put, take
from ringattn.planning.state_exchange import Relayout


@overload
def moved(tensors: list[torch.Tensor], move: Relayout, comm: Comm) -> list[torch.Tensor]: ...


@overload
def moved(
    tensors: Sequence[torch.Tensor | None], move: Relayout, comm: Comm
) -> list[torch.Tensor | None]: ...


def moved(tensors: Sequence[torch.Tensor | None], move: Relayout, comm: Comm) -> Any:
    """``[batch, tokens, ...]`` of this rank in the layout that ``move`` goes to, in one exchange;
    None stays None. Gradients go the way back. Collective."""
    given = [x for x in tensors if x is not None]
    there = iter(_Moved.apply(move, comm, *given))
    return [None if x is None else next(there) for x in tensors]


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, move: Relayout, comm: Comm, *tensors):
        ctx.move, ctx.comm = move, comm
        return tuple(_exchange(tensors, move, comm, "tokens to another layout"))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        wanted = ctx.needs_input_grad[2:]
        sent = [grad for grad, want in zip(grads, wanted, strict=True) if want]
        back = iter(_exchange(sent, ctx.move.back, ctx.comm, "gradients of moved tokens"))
        return None, None, *(next(back) if want else None for want in wanted)


def _exchange(
    tensors: Sequence[torch.Tensor], move: Relayout, comm: Comm, label: str
) -> list[torch.Tensor]:
    sends, recvs = move.moves(comm.rank)
    messages, inbox, there = [], Inbox(), []
    for x in tensors:
        new = x.new_empty(x.shape[0], move.target.count(comm.rank), *x.shape[2:])
        messages += [(take(x, rows).contiguous(), peer) for peer, rows in sends.items()
                     if peer != comm.rank]  # fmt: skip
        for peer, rows in recvs.items():
            if peer == comm.rank:
                put(new, rows, take(x, sends[peer]))
            else:
                inbox.into(peer, new, rows)
        there.append(new)
    if messages or inbox.messages:
        comm.start(messages, inbox.messages, label).wait()
    inbox.unpack()
    return there
