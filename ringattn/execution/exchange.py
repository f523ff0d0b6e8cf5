"""Moves and head splits as messages: which tensors to hand to a carrier, and where what arrives
belongs. Tensors are ``[batch, tokens, heads, head_dim]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch

from ringattn.execution.carriers import Comm, Message
from ringattn.planning.head_split import HeadSplit
from ringattn.planning.runs import Run

Rows = Sequence[Run]


def take(x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """The rows as one dense buffer; a view where x holds them so already."""
    parts = [_at(x, run) for run in rows]
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, 1)


def put(x: torch.Tensor, rows: Rows, part: torch.Tensor) -> None:
    """Writes ``part`` into the rows."""
    for run, own in _places(rows):
        _at(x, run).copy_(_at(part, own))


def add(x: torch.Tensor, rows: Rows, part: torch.Tensor) -> None:
    """Adds ``part`` to the rows."""
    for run, own in _places(rows):
        _at(x, run).add_(_at(part, own))


def _at(x: torch.Tensor, run: Run) -> torch.Tensor:
    """A view; x itself where it has no other rows."""
    if run.step > 1:
        return x[:, run.start : run.stop : run.step]
    return x if len(run) == x.shape[1] else x.narrow(1, run.start, len(run))


def _places(rows: Rows) -> list[tuple[Run, Run]]:
    ends = accumulate(map(len, rows), initial=0)
    return [(run, Run(*end)) for run, end in zip(rows, pairwise(ends), strict=True)]


@dataclass
class Inbox:
    """Buffers for one exchange, and what to do with each once it is filled."""

    messages: list[Message] = field(default_factory=list)
    _then: list[Callable[[], None]] = field(default_factory=list)

    def expect(self, peer: int, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """A new buffer of ``shape`` that ``peer`` fills."""
        buffer = like.new_empty(shape)
        self.messages.append((buffer, peer))
        return buffer

    def into(self, peer: int, x: torch.Tensor, rows: Rows) -> None:
        """Rows of ``x`` that ``peer`` fills: in place where they are dense."""
        if len(rows) == 1 and rows[0].step == 1:
            view = _at(x, rows[0])
            if view.is_contiguous():
                self.messages.append((view, peer))
                return
        tokens = sum(map(len, rows))
        buffer = self.expect(peer, (x.shape[0], tokens, *x.shape[2:]), x)
        self._then.append(lambda: put(x, rows, buffer))

    def unpack(self) -> None:
        for action in self._then:
            action()


def scatter_heads(
    tensors: Sequence[tuple[torch.Tensor, Sequence[Rows], Sequence[Sequence[int]]]],
    split: HeadSplit,
    comm: Comm,
    label: str,
) -> list[torch.Tensor]:
    """From own tokens and all heads to all tokens of the group and this member's heads.

    Each tensor comes with the rows of every member's tokens, and the heads that every member
    takes of it. One exchange for all tensors.
    """
    sends, inbox, wholes = [], Inbox(), []
    for x, rows, heads in tensors:
        tokens = sum(len(run) for some in rows for run in some)
        whole = x.new_empty(x.shape[0], tokens, len(heads[split.member]), x.shape[3])
        for member, peer in enumerate(split.members):
            part = _heads(x, heads[member])
            if member == split.member:
                put(whole, rows[member], part)
                continue
            if x.shape[1]:
                sends.append((part.contiguous(), peer))
            if any(rows[member]):
                inbox.into(peer, whole, rows[member])
        wholes.append(whole)
    _exchange(sends, inbox, comm, label)
    return wholes


def gather_heads(
    tensors: Sequence[tuple[torch.Tensor, Sequence[Rows], Sequence[Sequence[int]], int]],
    split: HeadSplit,
    comm: Comm,
    label: str,
) -> list[torch.Tensor]:
    """The inverse of :func:`scatter_heads`; each tensor comes with the total number of heads.

    Heads that several members hold are summed, in the order of the members.
    """
    sends, inbox, parts = [], Inbox(), []
    for whole, rows, heads, _ in tensors:
        tokens = sum(map(len, rows[split.member]))
        received = []
        for member, peer in enumerate(split.members):
            if member == split.member:
                received.append(take(whole, rows[member]) if tokens else whole[:, :0])
                continue
            if any(rows[member]):
                sends.append((take(whole, rows[member]), peer))
            shape = (whole.shape[0], tokens, len(heads[member]), whole.shape[3])
            received.append(inbox.expect(peer, shape, whole) if tokens else whole.new_empty(shape))
        parts.append(received)
    _exchange(sends, inbox, comm, label)
    results = []
    for (whole, _, heads, total), received in zip(tensors, parts, strict=True):
        x = whole.new_zeros(whole.shape[0], received[0].shape[1], total, whole.shape[3])
        for some, part in zip(heads, received, strict=True):
            for head, column in zip(some, part.unbind(2), strict=True):
                x[:, :, head] += column
        results.append(x)
    return results


def _heads(x: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
    if isinstance(heads, range):
        return x[:, :, heads.start : heads.stop]
    return x[:, :, list(heads)]


def _exchange(sends: list[Message], inbox: Inbox, comm: Comm, label: str) -> None:
    comm.start(sends, inbox.messages, label).wait()
    inbox.unpack()
