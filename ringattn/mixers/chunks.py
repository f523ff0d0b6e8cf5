"""Tokens in chunks, and states from chunk to chunk.

Every chunk does to a state ``[dk, dv]`` what its summary says: ``transition state + addend``.
A transition is a matrix ``[dk, dk]``, or what stands on its diagonal, ``[dk, 1]`` or ``[1, 1]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any

import numpy as np
import torch

from ringattn.planning.segments import Piece, Segments


def in_float32(mixer: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``mixer`` outside of autocast, which would take its states to half precision."""

    @wraps(mixer)
    def outside(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return mixer(x, *args, **kwargs)

    return outside


def nothing(like: torch.Tensor, *inputs: torch.Tensor | None) -> torch.Tensor:
    """The result of a rank without tokens, of the shape of ``like``; all inputs get gradients of 0,
    as those of other ranks get theirs. No segment is such a rank's, so there is no exchange."""
    for x in (x for x in inputs if x is not None):
        like = like + (0.0 * x.sum()).to(like.dtype)
    return like


@lru_cache(maxsize=8)
def chunks_of(segments: Segments, rank: int, size: int, device: torch.device) -> Chunks:
    """The same arguments give the same object: all layers of a forward share it."""
    tokens = segments.layout.count(rank)
    return Chunks(segments.pieces(rank), size, tokens, device)


class Chunks:
    """Of a rank's pieces, each cut into chunks of ``size`` tokens, the last of them padded."""

    def __init__(
        self, pieces: Sequence[Piece], size: int, tokens: int, device: torch.device
    ) -> None:
        self.size, self.tokens, self.pieces = size, tokens, pieces
        counts = np.array([-(-len(piece) // size) for piece in pieces], np.int64)
        ends = np.cumsum(counts)
        self.lines = [(int(end - count), int(end)) for count, end in zip(counts, ends, strict=True)]
        index = np.full((int(counts.sum()), size), tokens, np.int64)
        for piece, (first, last) in zip(pieces, self.lines, strict=True):
            index[first:last].reshape(-1)[: len(piece)] = np.arange(piece.start, piece.stop)
        back = np.argsort(index.reshape(-1), kind="stable")[:tokens].copy()
        self.index, self.back = (torch.from_numpy(x).to(device) for x in (index, back))

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """``[batch, tokens, heads, ...]`` as float32 ``[chunks, batch, heads, size, ...]``, padded
        with 0."""
        x = torch.cat([x, x.new_zeros(x.shape[0], 1, *x.shape[2:])], 1)
        chunked = x[:, self.index]  # [batch, chunks, size, heads, ...]
        return chunked.movedim(0, 1).movedim(3, 2).float()

    def joined(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse."""
        flat = x.movedim(2, 3).movedim(1, 0).flatten(1, 2)  # [batch, chunks * size, heads, ...]
        return flat[:, self.back]


def applied(transition: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """What a transition makes of a state."""
    if transition.shape[-1] == 1:
        return transition * state
    return transition @ state


def applied_back(transition: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient of the state, of that of what came out."""
    return applied(transition.mT if transition.shape[-1] > 1 else transition, grad)


def transition_grad(
    transition: torch.Tensor, state: torch.Tensor, grad: torch.Tensor
) -> torch.Tensor:
    """The gradient of the transition."""
    if transition.shape[-1] > 1:
        return grad @ state.mT
    return (grad * state).sum(-1, keepdim=True).sum_to_size(transition.shape)


def follow(
    transition: torch.Tensor,
    addend: torch.Tensor,
    first: torch.Tensor,
    lines: Sequence[tuple[int, int]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the state before every chunk ``[chunks, ...]``, the state after the last one of each line
    ``[lines, ...]``). ``lines``: chunks that follow each other, as (first, last + 1); ``first``:
    the state that each begins with."""
    return _Follow.apply(transition, addend, first, tuple(lines))


def _steps(lines: Sequence[tuple[int, int]]) -> tuple[list[int], list[list[int]]]:
    """Lines side by side: their order, the longest first, and the chunks of each step."""
    order = sorted(range(len(lines)), key=lambda i: lines[i][0] - lines[i][1])
    most = max((b - a for a, b in lines), default=0)
    return order, [
        [lines[i][0] + t for i in order if lines[i][1] - lines[i][0] > t] for t in range(most)
    ]


class _Follow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, transition, addend, first, lines):
        order, steps = _steps(lines)
        states = torch.zeros_like(addend)
        state = first[order].clone()
        for at in steps:
            now = state[: len(at)]
            at = _index(at)
            states[at] = now
            state[: len(now)] = applied(transition[at], now) + addend[at]
        ends = torch.empty_like(state)
        ends[order] = state
        ctx.save_for_backward(transition, states)
        ctx.order, ctx.steps = order, steps
        return states, ends

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_states, d_ends):
        transition, states = ctx.saved_tensors
        after = torch.zeros_like(states)  # the gradient of what each chunk hands on
        grad = d_ends[ctx.order].clone()
        for at in reversed(ctx.steps):
            count, at = len(at), _index(at)
            after[at] = grad[:count]
            grad[:count] = applied_back(transition[at], grad[:count]) + d_states[at]
        d_first = torch.empty_like(grad)
        d_first[ctx.order] = grad
        return transition_grad(transition, states, after), after, d_first, None


def _index(at: list[int]) -> slice | list[int]:
    """One chunk as a slice: no copy."""
    return slice(at[0], at[0] + 1) if len(at) == 1 else at
