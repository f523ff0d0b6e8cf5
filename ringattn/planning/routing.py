"""Plans of what is only known at run time: which queries have chosen which blocks.

Batches and heads that choose for themselves are *copies* of the sequence, laid end to end: the keys
of copy c are positions c n to (c + 1) n, and the queries are the rows that have chosen a block,
each as often as it has, by copy and block. So a choice is a mask of full rectangles, and its plan
is a plan like others: rows that nobody chose do not travel.
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise

import numpy as np

from ringattn.planning.blocks import Blocks
from ringattn.planning.layouts import Layout
from ringattn.planning.masks import Mask
from ringattn.planning.plan import Plan
from ringattn.planning.runs import Run
from ringattn.planning.schedules import Move, RankPlan, Step, stages_of
from ringattn.planning.slices import Band, Bands, Slice


def copies_of(layout: Layout, copies: int) -> Layout:
    """The layout of so many copies of the tokens, laid end to end."""
    n = layout.n
    runs = (
        tuple(Run(c * n + run.start, c * n + run.stop) for c in range(copies) for run in own)
        for own in layout.runs
    )
    return Layout(n * copies, tuple(runs), layout.name)


class ChoicePlan(Plan):
    """The plan of ``counts`` int ``[world, copies, blocks]``: how many rows of each rank have
    chosen a block; a rank's rows are in that order. Schedule direct.

    It equals the plan that :func:`ringattn.make_plan` makes of its mask, with more and smaller
    bands; but a rank works out its own steps from the counts alone, since there is one such plan in
    every layer of every step. Its mask, of as many slices as there are choices of all ranks, is
    made where somebody asks for it.
    """

    def __init__(self, blocks: Blocks, counts: np.ndarray) -> None:
        world, copies, _ = counts.shape
        keys = blocks.remember(("copies", copies), lambda: copies_of(blocks.layout, copies))
        cuts = [0, *np.cumsum(counts.reshape(world, -1).sum(1)).tolist()]
        runs = tuple((Run(a, b),) if b > a else () for a, b in pairwise(cuts))
        rows = Layout(cuts[-1], runs, "rows that chose")
        self.__dict__.update(blocks=blocks, counts=counts)
        super().__init__(None, rows, keys, "direct", 1, world)  # its mask comes later
        del self.__dict__["mask"]

    @cached_property
    def mask(self) -> Mask:
        """Full rectangles: the rows that chose a block, and the block."""
        n, blocks = self.blocks.layout.n, self.blocks
        rank, copy, block = np.nonzero(self.counts)
        stops = np.cumsum(self.counts[rank, copy, block])
        starts = stops - self.counts[rank, copy, block]
        first, last = (x[block] + copy * n for x in (blocks.starts, blocks.stops))
        parts = tuple(
            Slice(Run(a, b), Run(c, d), c - b + 1, d - 1 - a)
            for a, b, c, d in zip(*(x.tolist() for x in (starts, stops, first, last)), strict=True)
        )
        return Mask(parts, self.layout.n, self.key_layout.n)

    def __str__(self) -> str:
        return f"a choice over {self.world} ranks: {self.mask.area} pairs"

    def rank(self, rank: int) -> RankPlan:
        """The blocks and steps of ``rank``; worked out on first use and kept."""
        if rank not in self._ranks:
            self._ranks[rank] = self._made(rank)
        return self._ranks[rank]

    @cached_property
    def _stages(self) -> list[list[int]]:
        chosen = (self.counts > 0).sum(1)  # [reader, block], copies together
        pieces, owned = self.blocks.pieces, np.zeros((len(self.blocks), self.world), np.int64)
        np.add.at(owned, (pieces.block, pieces.rank), pieces.stop - pieces.first)
        return stages_of(chosen @ owned, self.key_layout.n)

    def _rows(self, reader: int, owner: int) -> tuple[np.ndarray, ...]:
        """(copy, block, first, stop) of the owner's local rows that the reader chose, in order."""
        pieces = self.blocks.pieces
        of = np.flatnonzero(pieces.rank == owner)
        of = of[np.argsort(pieces.first[of], kind="stable")]
        copy, at = np.nonzero(self.counts[reader][:, pieces.block[of]])
        base = copy * self.blocks.layout.count(owner)
        at = of[at]
        return copy, pieces.block[at], pieces.first[at] + base, pieces.stop[at] + base

    def _made(self, rank: int) -> RankPlan:
        world, counts = self.world, self.counts[rank]
        stops = np.cumsum(counts).reshape(counts.shape)
        sizes = [self.key_layout.count(rank)]
        copy, block, first, stop = self._rows(rank, rank)
        work = [_rectangles(stops, counts, copy, block, first, stop - first)]
        sends: list[list[Move]] = []
        recvs: list[list[Move]] = []
        for stage in self._stages:
            filled, bands = 0, []
            sends.append([])
            recvs.append([])
            for distance in stage:
                reader, owner = (rank + distance) % world, (rank - distance) % world
                *_, first, stop = self._rows(reader, rank)
                if len(first):
                    sends[-1].append(Move(reader, 0, _joined(first, stop)))
                copy, block, first, stop = self._rows(rank, owner)
                if len(first):
                    size = stop - first
                    places = filled + np.cumsum(size) - size
                    bands += _rectangles(stops, counts, copy, block, places, size)
                    end = filled + int(size.sum())
                    recvs[-1].append(Move(owner, len(sizes), (Run(filled, end),)))
                    filled = end
            sizes.append(filled)
            work.append(bands)
        last = len(work) - 1
        steps = [
            Step(
                block=index,
                bands=Bands(work[index]),
                sends=tuple(sends[index]) if index < last else (),
                recvs=tuple(recvs[index]) if index < last else (),
                grad_sends=tuple(recvs[index - 1]) if index else (),
                grad_recvs=tuple(sends[index - 1]) if index else (),
            )
            for index in range(last + 1)
        ]
        return RankPlan(tuple(sizes), tuple(steps))


def _rectangles(
    stops: np.ndarray, counts: np.ndarray, copy: np.ndarray, block: np.ndarray,
    first: np.ndarray, size: np.ndarray,
) -> list[Band]:  # fmt: skip
    """The rows that chose (copy, block) by so many rows of a buffer, from ``first`` on."""
    end, count = stops[copy, block], counts[copy, block]
    return [
        Band(Run(q - rows, q), Run(k, k + keys), -rows, keys)
        for q, rows, k, keys in zip(*(x.tolist() for x in (end, count, first, size)), strict=True)
    ]


def _joined(first: np.ndarray, stop: np.ndarray) -> tuple[Run, ...]:
    """Ascending disjoint intervals as runs, neighbours made one."""
    cut = np.flatnonzero(first[1:] != stop[:-1]) + 1
    starts = first[np.append(0, cut)].tolist()
    ends = stop[np.append(cut, len(stop)) - 1].tolist()
    return tuple(Run(a, b) for a, b in zip(starts, ends, strict=True))


_SLICES = 2**15  # of a stand-in, about


def expected(blocks: Blocks, picks: int) -> Mask:
    """A stand-in, for forecasts, of a choice that is not known yet: every token with ``picks`` of
    the earlier blocks of its document, spread evenly: about as many pairs as a choice has, and rows
    from everywhere. Blocks that follow each
    other share what they see, as many as keep the mask short."""
    together = max(1, len(blocks) * min(picks, len(blocks)) // _SLICES)
    parts = []
    for first, last in zip(blocks.firsts.tolist(), blocks.lasts.tolist(), strict=True):
        for own in range(first, last, together):
            q = Run(int(blocks.starts[own]), int(blocks.stops[min(own + together, last) - 1]))
            count = own - first
            if count <= picks:
                runs = [(first, own)] if count else []
            else:
                chosen = [first + (2 * i + 1) * count // (2 * picks) for i in range(picks)]
                runs = [(block, block + 1) for block in chosen]
            parts += [
                Slice.make(q, Run(int(blocks.starts[a]), int(blocks.stops[b - 1]))) for a, b in runs
            ]
    n = blocks.layout.n
    return Mask(tuple(part for part in parts if part), n, n)
