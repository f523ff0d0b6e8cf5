"""Whose summaries are composed to the first state of whose segment, and in which exchanges.

A segment's sources are the segments before it, back to where its document began; in the backward
those after it that its state reaches, whose first states' gradients come back. Both ways the
neighbour is the nearest source, and all but the farthest hand on what reaches them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from ringattn.planning.segments import Segments


class Prefixes:
    """Of ``segments``, one way along them. Everything is local arithmetic on numbers of segments.

    Without ``doubling`` there is one step: each segment reads the summary of every source. With it
    they are the steps of a parallel prefix sum (Kogge and Stone 1973): first the neighbour's
    summary, then what the segment 1, 2, 4, ... before has composed until then, so the number of
    summaries read is the logarithm of the number of sources.
    """

    def __init__(self, segments: Segments, backward: bool = False, doubling: bool = False) -> None:
        self.segments, self.doubling = segments, doubling
        self.toward = 1 if backward else -1  # from a segment to its nearest source
        count, self.counts = len(segments.all), [0] * len(segments.all)
        for number in range(count - 2, -1, -1) if backward else range(1, count):
            near = segments.all[number + self.toward]
            if (near if backward else segments.all[number]).carries:
                more = self.counts[near.number] if near.passes else 0
                self.counts[number] = 1 + more

    @property
    def steps(self) -> int:
        most = max(self.counts, default=0)
        return min(most, 1) if not self.doubling or most < 2 else 1 + (most - 1).bit_length()

    def reads(self, step: int, number: int) -> list[int]:
        """The segments that this one reads in a step, the nearest first."""
        count, toward = self.counts[number], self.toward
        if step == 0:
            most = min(count, 1) if self.doubling else count
            return [number + toward * (1 + i) for i in range(most)]
        apart = self._apart(step)
        return [number + toward * apart] if count > apart else []

    def readers(self, step: int, number: int) -> Iterator[int]:
        """The segments that read this one in a step, the nearest first."""
        apart, least = (self._apart(step), self._apart(step)) if step else (1, 0)
        reader = number - self.toward * apart
        while 0 <= reader < len(self.counts) and self.counts[reader] > least:
            yield reader
            if step or self.doubling:
                return
            reader, least = reader - self.toward, least + 1

    def through(self, step: int, number: int) -> bool:
        """Whether who reads this segment in a step needs its transition too: whether there are
        sources beyond it."""
        if step == 0:
            return self.segments.all[number].passes and self.counts[number] > 0
        return self.counts[number] > self._apart(step)

    def goes_on(self, step: int, number: int) -> bool:
        """Whether sources of this segment are left to be read after a step."""
        return self.doubling and self.counts[number] > self._apart(step + 1)

    def moves(self, rank: int, step: int) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        """(what ``rank`` sends, what it receives) in a step: {peer: segments in their order}."""
        sends: dict[int, set[int]] = defaultdict(set)
        for segment in self.segments.of(rank):
            for reader in self.readers(step, segment.number):
                sends[self.segments.all[reader].rank].add(segment.number)
        sends.pop(rank, None)
        return _sorted(sends), self.receives(rank, step)

    def receives(self, rank: int, step: int) -> dict[int, list[int]]:
        """What ``rank`` receives in a step."""
        recvs: dict[int, set[int]] = defaultdict(set)
        for segment in self.segments.of(rank):
            for source in self.reads(step, segment.number):
                recvs[self.segments.all[source].rank].add(source)
        recvs.pop(rank, None)
        return _sorted(recvs)

    @staticmethod
    def _apart(step: int) -> int:
        """How far a read of a later step goes: as far as all that was read before."""
        return 1 << (step - 1)


def _sorted(moves: dict[int, set[int]]) -> dict[int, list[int]]:
    return {peer: sorted(some) for peer, some in sorted(moves.items())}
