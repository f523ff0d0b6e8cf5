"""How the states of one layer get from segment to segment: what is sent, in how many exchanges, and
whether the tokens move to longer segments first. Decided by bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from ringattn.planning.layouts import Layout
from ringattn.planning.prefixes import Prefixes
from ringattn.planning.runs import Run
from ringattn.planning.segments import WAYS, Segments

STEP_BYTES = 1 << 18  # that an exchange counts for beside its own: 10 us of 25 GB/s


@dataclass(frozen=True)
class StateBytes:
    """Bytes of a summary's ``state`` and of its ``transition``; of a token, what a mixer is given
    (``given``: q, k, v, decays, ...) and what it returns (``returned``)."""

    state: int
    transition: int
    given: int
    returned: int

    def times(self, batch: int) -> StateBytes:
        return StateBytes(
            *(batch * x for x in (self.state, self.transition, self.given, self.returned))
        )


@dataclass(frozen=True)
class Incoming:
    """What one rank receives in one exchange: bytes, and from how many peers."""

    size: int
    peers: int


class Relayout:
    """Tokens from one layout of contiguous runs to another, over the same ranks."""

    def __init__(self, source: Layout, target: Layout) -> None:
        self.source, self.target = source, target

    def moves(self, rank: int) -> tuple[dict[int, list[Run]], dict[int, list[Run]]]:
        """({peer: local rows that ``rank`` sends}, {peer: local rows of the target that come}),
        what stays included, in the order of the sequence."""
        sends, recvs = self._moves
        return sends[rank], recvs[rank]

    def received(self, rank: int) -> int:
        """Tokens that come from others."""
        rows = self._moves[1][rank]
        return sum(sum(map(len, some)) for peer, some in rows.items() if peer != rank)

    def peers(self, rank: int) -> int:
        return len(self._moves[1][rank].keys() - {rank})

    @cached_property
    def back(self) -> Relayout:
        return Relayout(self.target, self.source)

    @cached_property
    def _moves(self) -> tuple[list[dict[int, list[Run]]], list[dict[int, list[Run]]]]:
        sides = []
        for layout in (self.source, self.target):
            owned = ((run.start, run.stop, rank, offset) for rank in layout.ranks
                     for offset, run in layout.numbered(rank) if run)  # fmt: skip
            sides.append(sorted(owned))
        sends: list[dict[int, list[Run]]] = [{} for _ in self.source.ranks]
        recvs: list[dict[int, list[Run]]] = [{} for _ in self.target.ranks]
        at = there = 0
        while at < len(sides[0]) and there < len(sides[1]):
            (a, a_end, sender, a_offset) = sides[0][at]
            (b, b_end, receiver, b_offset) = sides[1][there]
            begin, end = max(a, b), min(a_end, b_end)
            out, into = begin - a + a_offset, begin - b + b_offset
            sends[sender].setdefault(receiver, []).append(Run(out, out + end - begin))
            recvs[receiver].setdefault(sender, []).append(Run(into, into + end - begin))
            at, there = at + (a_end == end), there + (b_end == end)
        return sends, recvs


class StateExchange:
    """One ``way`` of it, of ``segments.WAYS``: "direct", "doubling", or either of them in a
    contiguous layout, to which tokens ``move``, and from which what the mixer returns comes back.
    """

    def __init__(self, segments: Segments, way: str) -> None:
        self.way, self.move = way, None
        if way.startswith("contiguous"):
            self.move = Relayout(segments.layout, segments.contiguous.layout)
            segments = segments.contiguous
        self.segments = segments
        doubling = way.endswith("doubling")
        self.forward = Prefixes(segments, False, doubling)
        self.backward = Prefixes(segments, True, doubling)

    def incoming(self, rank: int, sizes: StateBytes) -> tuple[list[Incoming], list[Incoming]]:
        """What ``rank`` receives, exchange by exchange, in the (forward, backward) of a layer. It
        does not depend on the length, but for tokens that move."""
        forward, backward = ([_step(prefixes, rank, step, sizes) for step in range(prefixes.steps)]
                             for prefixes in (self.forward, self.backward))  # fmt: skip
        if self.move:
            there, home = self.move, self.move.back
            went, came = there.received(rank), home.received(rank)
            peers = there.peers(rank), home.peers(rank)
            forward = [Incoming(went * sizes.given, peers[0]), *forward,
                       Incoming(came * sizes.returned, peers[1])]  # fmt: skip
            backward = [Incoming(went * sizes.returned, peers[0]), *backward,
                        Incoming(came * sizes.given, peers[1])]  # fmt: skip
        return forward, backward

    def received(self, rank: int, sizes: StateBytes) -> tuple[int, int]:
        """Bytes that ``rank`` receives in the (forward, backward) of a layer."""
        forward, backward = self.incoming(rank, sizes)
        return sum(x.size for x in forward), sum(x.size for x in backward)

    def most(self, sizes: StateBytes) -> tuple[int, int]:
        """(bytes that the rank which receives most receives, both ways; the exchanges of a layer,
        both ways)."""
        each = [self.incoming(rank, sizes) for rank in self._busiest]
        exchanges = len(each[0][0]) + len(each[0][1])
        return max(sum(x.size for x in (*there, *back)) for there, back in each), exchanges

    def weight(self, sizes: StateBytes) -> int:
        """What decides: most bytes, and ``STEP_BYTES`` for every exchange."""
        size, exchanges = self.most(sizes)
        return size + STEP_BYTES * exchanges

    @property
    def _busiest(self) -> set[int]:
        """Ranks of which one receives about most: those with the most sources or segments, and the
        ends and the middle of the group."""
        every, ranks = self.segments.all, self.segments.layout.ranks
        if not every:
            return {0}
        ends = (every[p.counts.index(max(p.counts))].rank for p in (self.forward, self.backward))
        most = max(ranks, key=lambda rank: len(self.segments.of(rank)))
        return {*ends, most, 0, len(ranks) // 2, len(ranks) - 1}


def _step(prefixes: Prefixes, rank: int, step: int, sizes: StateBytes) -> Incoming:
    recvs = prefixes.receives(rank, step)
    size = sum(
        sizes.state + sizes.transition * prefixes.through(step, number)
        for some in recvs.values()
        for number in some
    )
    return Incoming(size, len(recvs))


@lru_cache(maxsize=16)
def exchange_of(segments: Segments, sizes: StateBytes) -> StateExchange:
    """That of the least weight (of equals the first of ``WAYS``), or of ``segments.way``. The same
    arguments give the same object, and all ranks choose alike."""
    layout = segments.layout
    ways = [segments.way] if segments.way else WAYS if layout.n >= layout.world else WAYS[:2]
    each = [_exchange(segments, way) for way in ways]
    return min(each, key=lambda exchange: exchange.weight(sizes)) if each[1:] else each[0]


@lru_cache(maxsize=64)
def _exchange(segments: Segments, way: str) -> StateExchange:
    return StateExchange(segments, way)
