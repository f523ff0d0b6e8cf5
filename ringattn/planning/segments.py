"""Segments: a layout's runs, as mixers with a state along the sequence see them.

A segment takes a state from the one before it, unless a document begins with it, and hands one on.
What it does to a state is a summary (a transition and an addend), so the first state of a segment
is made of the summaries of those before it, back to where a document began: these are the moves of
such a layer, counted here. A short convolution needs the last tokens before a segment: its halo.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from ringattn.planning import layouts
from ringattn.planning.layouts import Layout
from ringattn.planning.runs import Run

_SHOWN = 16  # segments that are printed
WAYS = ("direct", "doubling", "contiguous direct", "contiguous doubling")


@dataclass(frozen=True)
class Segment:
    """``number``: in the order of the sequence; ``offset``: the local index of its first token on
    ``rank``; ``starts``: the positions in it at which documents begin."""

    number: int
    rank: int
    run: Run
    offset: int
    starts: tuple[int, ...]

    @property
    def carries(self) -> bool:
        """Whether its first token goes on with a document of the segment before."""
        return not self.starts or self.starts[0] > self.run.start

    @property
    def passes(self) -> bool:
        """Whether a state goes through all of it."""
        return not self.starts

    @property
    def pieces(self) -> list[Piece]:
        """Its tokens by document."""
        cuts = [self.run.start] if self.carries else []
        cuts += [*self.starts, self.run.stop]
        shift = self.offset - self.run.start
        return [
            Piece(a + shift, b + shift, self, carries=self.carries and a == self.run.start)
            for a, b in pairwise(cuts)
        ]


@dataclass(frozen=True)
class Piece:
    """Tokens ``start`` to ``stop``, local, of one document in a segment; ``carries``: whether they
    go on with one."""

    start: int
    stop: int
    segment: Segment
    carries: bool

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def last(self) -> bool:
        """Whether its end is the segment's."""
        segment = self.segment
        return self.stop - segment.offset == len(segment.run)


@dataclass(frozen=True)
class Halo:
    """What the pieces of a rank need of the tokens before them. ``sends`` and ``recvs``: local rows
    for each peer, and how many rows come from it; ``before``: for each piece the rows before it,
    the nearest last, as local rows, or as ``tokens + i`` for the received row ``i``."""

    sends: dict[int, list[Run]]
    recvs: dict[int, int]
    before: list[list[int]]


class Segments:
    """Of a ``layout`` whose sequence holds documents of these ``lengths``. ``way``: how states are
    exchanged, one of ``WAYS``; None: for each layer what weighs least (see ``state_exchange``).

    Raises ValueError for a layout whose runs are not contiguous (striped): there a state would
    travel with every token.
    """

    def __init__(self, layout: Layout, lengths: Sequence[int], way: str | None = None) -> None:
        if way is not None and way not in WAYS:
            raise ValueError(f"way must be one of {', '.join(WAYS)} or None, got {way!r}")
        if way and way.startswith("contiguous") and layout.n < layout.world:
            raise ValueError(f"way={way!r}: {layout.n} tokens for {layout.world} ranks")
        self.way = way
        if layout.step > 1:
            raise ValueError(
                f"the layout {layout.name} has runs of step {layout.step}: a state would travel "
                "with every token; take contiguous, zigzag or balanced"
            )
        if sum(lengths) != layout.n:
            raise ValueError(f"documents of {sum(lengths)} tokens in a layout of {layout.n}")
        self.layout, self.lengths = layout, tuple(int(x) for x in lengths if x)
        starts = list(accumulate(self.lengths, initial=0))[:-1]
        self._starts = starts
        numbered = sorted(
            (run.start, run.stop, rank, offset)
            for rank in layout.ranks
            for offset, run in layout.numbered(rank)
            if run
        )
        self.all = tuple(
            Segment(
                number,
                rank,
                Run(begin, end),
                offset,
                tuple(starts[bisect_left(starts, begin) : bisect_left(starts, end)]),
            )
            for number, (begin, end, rank, offset) in enumerate(numbered)
        )

    def __str__(self) -> str:
        lines = [f"{len(self.all)} segments of {self.layout.name}, {len(self.lengths)} documents"]
        for segment in self.all[:_SHOWN]:
            line = f"  {segment.number}: {segment.run} on rank {segment.rank}"
            if sources := self.sources(segment):
                numbers = ", ".join(str(source.number) for source in sources)
                line += f"; its first state is made of {numbers}"
            if segment.starts:
                line += f"; documents begin at {', '.join(map(str, segment.starts[:4]))}"
                line += ", ..." if len(segment.starts) > 4 else ""
            lines.append(line)
        rest = len(self.all) - _SHOWN
        return "\n".join(lines + ([f"  and {rest} more"] if rest > 0 else []))

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.layout.world

    @cached_property
    def _own(self) -> dict[int, list[Segment]]:
        own: dict[int, list[Segment]] = defaultdict(list)
        for segment in self.all:
            own[segment.rank].append(segment)
        return own

    def of(self, rank: int) -> list[Segment]:
        """Those of a rank, in their order."""
        return self._own.get(rank, [])

    def pieces(self, rank: int) -> list[Piece]:
        """The tokens of a rank by segment and document, in local order."""
        pieces = [piece for segment in self.of(rank) for piece in segment.pieces]
        return sorted(pieces, key=lambda piece: piece.start)

    def sources(self, segment: Segment) -> list[Segment]:
        """Those whose summaries make the first state of ``segment``, in their order; none where a
        document begins with it."""
        if not segment.carries:
            return []
        first = segment.number - 1
        while self.all[first].passes:
            first -= 1
        return list(self.all[first : segment.number])

    def read(self, segment: Segment) -> bool:
        """Whether any segment needs this one's summary."""
        after = segment.number + 1
        return after < len(self.all) and self.all[after].carries

    @cached_property
    def contiguous(self) -> Segments:
        """The same documents over the same ranks, one segment each."""
        return Segments(layouts.contiguous(self.layout.n, self.world), self.lengths)

    def halo(self, rank: int, size: int) -> Halo:
        """What ``rank`` needs for a convolution over ``size`` tokens before each one."""
        sends: dict[int, list[Run]] = defaultdict(list)
        places: dict[int, dict[int, list[list[int]]]] = {}
        begins = [segment.run.start for segment in self.all]
        counts: dict[int, int] = defaultdict(int)
        for segment in self.all:
            if not segment.carries:
                continue
            document = self._starts[bisect_right(self._starts, segment.run.start) - 1]
            at = max(document, segment.run.start - size)
            while at < segment.run.start:
                owner = self.all[bisect_right(begins, at) - 1]
                end = min(owner.run.stop, segment.run.start)
                shift = owner.offset - owner.run.start
                rows = Run(at + shift, end + shift)
                if segment.rank == rank:
                    peer = owner.rank
                    first = rows.start if peer == rank else counts[peer]
                    places.setdefault(segment.number, {}).setdefault(peer, []).append(
                        [at, first, len(rows)]
                    )
                    if peer != rank:
                        counts[peer] += len(rows)
                elif owner.rank == rank:
                    sends[segment.rank].append(rows)
                at = end
        tokens, recvs = self.layout.count(rank), dict(sorted(counts.items()))
        base = dict(zip(recvs, accumulate(recvs.values(), initial=tokens), strict=False))
        before = []
        for piece in self.pieces(rank):
            found: list[tuple[int, int]] = []
            if piece.carries:
                for peer, parts in places.get(piece.segment.number, {}).items():
                    shift = 0 if peer == rank else base[peer]
                    for at, first, count in parts:
                        found += [(at + i, shift + first + i) for i in range(count)]
            before.append([row for _, row in sorted(found)])
        return Halo(dict(sorted(sends.items())), recvs, before)
