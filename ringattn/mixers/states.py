"""First states of segments: summaries are exchanged while local work goes on, and composed in the
order of the sequence; in the backward the gradients of first states go the same ways back.

What travels is float32; its size does not depend on the length. See
:class:`ringattn.planning.prefixes.Prefixes` for who needs what.
"""

from __future__ import annotations

import torch

from ringattn.execution.carriers import Comm, Pending
from ringattn.mixers.chunks import applied, transition_grad
from ringattn.planning.prefixes import Prefixes
from ringattn.planning.state_exchange import StateExchange

Summary = tuple[torch.Tensor | None, torch.Tensor]  # transition where it is needed, and addend


class FirstStates:
    """The state that each of this rank's segments begins with, of their transitions and addends,
    ``[segments, batch, heads, ...]`` in float32. The exchange begins when this is made; what is
    computed until :meth:`wait` goes on beside its first step, and so does the backward of that.

    Collective, in the backward too: a rank whose summaries nobody needs still has gradients to
    send, and takes part if ``inputs``, any tensor of the layer, want some.
    """

    def __init__(
        self,
        transition: torch.Tensor,
        addend: torch.Tensor,
        inputs: torch.Tensor,
        exchange: StateExchange,
        comm: Comm,
    ) -> None:
        self._exchange, self._comm = exchange, comm
        self._transition = transition.detach()
        # Two nodes of autograd, so that both directions have a begin and an end: gradients go from
        # the second to the first by this object, and what runs between them by a scalar.
        self._running: _Running | None = None
        self._saved: tuple[torch.Tensor, torch.Tensor] | None = None
        self._token = _Begin.apply(self, transition, addend, inputs)

    def wait(self) -> torch.Tensor:
        """``[segments, batch, heads, dk, dv]``, 0 where a document begins with a segment."""
        token, self._token = self._token, None  # whose graph knows this object: no circle
        return _End.apply(self, token)

    def _begin(
        self, prefixes: Prefixes, transition: torch.Tensor, state: torch.Tensor, label: str
    ) -> None:
        self._running = _Running(prefixes, self._comm, transition, state, label)

    def _end(self) -> torch.Tensor:
        running, self._running = self._running, None
        return running.end()


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, firsts, transition, addend, inputs):
        ctx.firsts = firsts
        firsts._begin(firsts._exchange.forward, transition, addend, "summaries of segments")
        return addend.new_zeros(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _):
        firsts = ctx.firsts
        d_addend = firsts._end()
        transition, first = firsts._saved
        firsts._saved = None
        d_transition = torch.zeros_like(transition)
        own = firsts._exchange.segments.of(firsts._comm.rank)
        for i, segment in enumerate(own):
            if segment.passes:
                d_transition[i] = transition_grad(transition[i], first[i], d_addend[i])
        return None, d_transition, d_addend, None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx, firsts, token):
        first = firsts._end()
        ctx.firsts = firsts
        ctx.save_for_backward(firsts._transition, first)
        firsts._transition = None
        return first

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_first):
        firsts = ctx.firsts
        firsts._saved = transition, _ = ctx.saved_tensors
        back = transition.mT if transition.shape[-1] > 1 else transition
        firsts._begin(firsts._exchange.backward, back, d_first.contiguous(), "gradients of states")
        return None, d_first.new_zeros(())


class _Running:
    """One exchange of all its steps: what each segment has composed so far, and the messages of a
    step that are under way."""

    def __init__(
        self,
        prefixes: Prefixes,
        comm: Comm,
        transition: torch.Tensor,
        state: torch.Tensor,
        label: str,
    ) -> None:
        self.prefixes, self.comm, self.label = prefixes, comm, label
        self.like, self.shapes = state, (state.shape[1:], transition.shape[1:])
        self.own = [segment.number for segment in prefixes.segments.of(comm.rank)]
        self.told: dict[int, Summary] = {
            number: (transition[i], state[i]) for i, number in enumerate(self.own)
        }
        self.composed: dict[int, Summary] = {}
        self.step = 0
        self._start()

    def end(self) -> torch.Tensor:
        """What the sources of each segment come to, ``[segments, ...]``."""
        while self.step < self.prefixes.steps:
            self._finish()
            self.step += 1
            self.told = self.composed
            if self.step < self.prefixes.steps:
                self._start()
        found = torch.zeros_like(self.like)
        for i, number in enumerate(self.own):
            if number in self.composed:
                found[i] = self.composed[number][1]
        return found

    def _start(self) -> None:
        sends, recvs = self.prefixes.moves(self.comm.rank, self.step)
        sizes = [shape.numel() for shape in self.shapes]
        self.buffers = {
            peer: self.like.new_empty(
                sum(sizes[0] + sizes[1] * self.prefixes.through(self.step, n) for n in some)
            )
            for peer, some in recvs.items()
        }
        self.recvs, self.pending = recvs, None
        if sends or recvs:
            self.pending: Pending | None = self.comm.start(
                [(self._packed(some), peer) for peer, some in sends.items()],
                [(buffer, peer) for peer, buffer in self.buffers.items()],
                self.label,
            )

    def _packed(self, some: list[int]) -> torch.Tensor:
        parts = []
        for number in some:
            transition, state = self.told[number]
            parts.append(state.flatten())
            if self.prefixes.through(self.step, number):
                parts.append(transition.flatten())
        return torch.cat(parts)

    def _finish(self) -> None:
        """Takes in what came, and composes it."""
        if self.pending:
            self.pending.wait()
        told = dict(self.told)
        for peer, some in self.recvs.items():
            rest = self.buffers[peer]
            for number in some:
                parts = []
                for shape in self.shapes[: 1 + self.prefixes.through(self.step, number)]:
                    parts.append(rest[: shape.numel()].view(shape))
                    rest = rest[shape.numel() :]
                told[number] = (parts[1] if parts[1:] else None, parts[0])
        composed = dict(self.composed)
        for number in self.own:
            near = [told[source] for source in self.prefixes.reads(self.step, number)]
            if not near:
                continue
            mine = [self.composed[number]] if number in self.composed else []
            through, state = near[-1]
            goes_on = self.prefixes.goes_on(self.step, number)
            for transition, addend in (*reversed(near[:-1]), *mine):  # from far to near
                state = applied(transition, state) + addend
                through = applied(transition, through) if goes_on else None
            composed[number] = (through, state)
        self.composed = composed
