"""First states of segments: summaries are exchanged in one symmetric step, and composed in the
order of the sequence; in the backward the gradients of first states go the same ways back.

What travels is float32; its size does not depend on the length. See
:class:`ringattn.planning.segments.Segments` for who needs what.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ringattn.execution.carriers import Comm
from ringattn.mixers.chunks import applied, applied_back, transition_grad
from ringattn.planning.segments import Segment, Segments

Summary = tuple[torch.Tensor | None, torch.Tensor]  # transition where it is needed, and addend


def first_states(
    transition: torch.Tensor,
    addend: torch.Tensor,
    inputs: torch.Tensor,
    segments: Segments,
    comm: Comm,
) -> torch.Tensor:
    """The state that each of this rank's segments begins with, ``[segments, batch, heads, dk,
    dv]``, 0 where a document begins with it; of their transitions and addends, float32.
    Collective, in the backward too: a rank whose summaries nobody needs still has gradients to
    send, and takes part if ``inputs``, any tensor of the layer, want some."""
    return _FirstStates.apply(transition, addend, inputs, segments, comm)


class _FirstStates(torch.autograd.Function):
    @staticmethod
    def forward(ctx, transition, addend, inputs, segments, comm):
        own = segments.of(comm.rank)
        known = _exchange(segments, comm, transition, addend, backward=False)
        first = torch.zeros_like(addend)
        for i, segment in enumerate(own):
            state = None
            for source in segments.sources(segment):
                through, added = known[source.number]
                state = added if state is None else applied(through, state) + added
            if state is not None:
                first[i] = state
        ctx.save_for_backward(transition, first)
        ctx.segments, ctx.comm = segments, comm
        return first

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_first):
        transition, first = ctx.saved_tensors
        segments, own = ctx.segments, ctx.segments.of(ctx.comm.rank)
        known = _exchange(segments, ctx.comm, transition, d_first.contiguous(), backward=True)
        d_addend = torch.zeros_like(d_first)
        for i, segment in enumerate(own):
            # From the end of those that a state reaches from here, back to here.
            reached = []
            for later in segments.all[segment.number + 1 :]:
                if not later.carries:
                    break
                reached.append(later)
                if not later.passes:
                    break
            grad = None
            for later in reversed(reached):
                through, told = known[later.number]
                grad = told if grad is None else applied_back(through, grad) + told
            if grad is not None:
                d_addend[i] = grad
        d_transition = torch.zeros_like(transition)
        for i, segment in enumerate(own):
            if segment.passes:
                d_transition[i] = transition_grad(transition[i], first[i], d_addend[i])
        return d_transition, d_addend, None, None, None


def _exchange(
    segments: Segments,
    comm: Comm,
    transition: torch.Tensor,
    state: torch.Tensor,
    backward: bool,
) -> dict[int, Summary]:
    """The summaries of this rank's segments and of all that it needs, by number."""
    own = {segment.number: i for i, segment in enumerate(segments.of(comm.rank))}
    sends, recvs = segments.moves(comm.rank, backward)

    def through(segment: Segment) -> bool:
        return segments.with_transition(segment, backward)

    def packed(some: list[Segment]) -> torch.Tensor:
        parts = []
        for segment in some:
            at = own[segment.number]
            parts += [state[at].flatten()]
            parts += [transition[at].flatten()] if through(segment) else []
        return torch.cat(parts)

    sizes = state[0].numel() if own else 0, transition[0].numel() if own else 0
    buffers = {
        peer: state.new_empty(sum(sizes[0] + sizes[1] * through(s) for s in some))
        for peer, some in recvs.items()
    }
    label = "gradients of states" if backward else "summaries of segments"
    if sends or recvs:
        comm.start(
            [(packed(some), peer) for peer, some in sends.items()],
            [(buffer, peer) for peer, buffer in buffers.items()],
            label,
        ).wait()
    known: dict[int, Summary] = {n: (transition[i], state[i]) for n, i in own.items()}
    for peer, some in recvs.items():
        at = 0
        take = _taker(buffers[peer])
        for segment in some:
            told = take(at, state.shape[1:])
            at += sizes[0]
            carried = take(at, transition.shape[1:]) if through(segment) else None
            at += sizes[1] * through(segment)
            known[segment.number] = (carried, told)
    return known


def _taker(buffer: torch.Tensor) -> Callable[[int, torch.Size], torch.Tensor]:
    return lambda at, shape: buffer[at : at + shape.numel()].view(shape)
