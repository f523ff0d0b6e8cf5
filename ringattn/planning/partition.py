"""A mask cut by the layouts of its queries and of its keys: who attends what, for all ranks.

A :class:`Partition` answers the questions that schedules ask: the pairs between two ranks, the keys
that a rank needs, how many of them each owner has. Everything is worked out on first use and
kept, for one rank where one rank asks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np

from ringattn.planning.intervals import Meetings, Side, Table, meet, union
from ringattn.planning.layouts import Layout
from ringattn.planning.masks import Mask
from ringattn.planning.runs import Run
from ringattn.planning.slices import NOTHING, Band, Slice

T = TypeVar("T")


class Partition:
    """``mask`` with queries owned as in ``q_layout`` and keys as in ``k_layout``."""

    def __init__(self, mask: Mask, q_layout: Layout, k_layout: Layout) -> None:
        self.mask, self.q_layout, self.k_layout = mask, q_layout, k_layout
        self._blocks: dict[int, dict[int, tuple[Slice, ...]]] = {}
        self._pieces: dict[int, list[tuple[int, Run, Slice]]] = {}
        self._remembered: dict[Hashable, Any] = {}

    @property
    def world(self) -> int:
        return self.q_layout.world

    def remember(self, key: Hashable, work: Callable[[], T]) -> T:
        """The result of ``work``, done once: for what all ranks of a schedule share."""
        if key not in self._remembered:
            self._remembered[key] = work()
        return self._remembered[key]

    @cached_property
    def _meetings(self) -> Meetings:
        return meet(self._table, Side.of(self.q_layout.owned))

    @cached_property
    def pairs_per_rank(self) -> np.ndarray:
        """int64 ``[world]``: pairs that each rank computes."""
        pairs = np.zeros(self.world, np.int64)
        np.add.at(pairs, self._meetings.tags, self._meetings.areas())
        return pairs

    @cached_property
    def attended_keys(self) -> tuple[tuple[Run, ...], ...]:
        """Per rank: the positions of the keys that its queries attend, as disjoint runs."""
        runs: list[list[Run]] = [[] for _ in range(self.world)]
        for rank, run in self._meetings.attended():
            runs[rank].append(run)
        return tuple(union(some) for some in runs)

    @cached_property
    def rows_needed(self) -> np.ndarray:
        """int64 ``[world, world]``: keys of each owner (column) that a rank (row) attends."""
        keys = Side.of(self.k_layout.owned)
        needed = np.zeros((self.world, self.world), np.int64)
        for rank, runs in enumerate(self.attended_keys):
            if not runs:
                continue
            if all(run.step == 1 for run in runs):
                starts = np.array([run.start for run in runs])
                stops = np.array([run.stop for run in runs])
                np.add.at(needed[rank], keys.tags, keys.counts(starts, stops))
            else:
                for run in runs:
                    owners = self._owners[run.start : run.stop : run.step]
                    needed[rank] += np.bincount(owners, minlength=self.world)
        return needed

    @cached_property
    def _owners(self) -> np.ndarray:
        """The owner of every key."""
        owners = np.zeros(self.k_layout.n, np.int32)
        for run, rank in self.k_layout.owned:
            owners[run.start : run.stop : run.step] = rank
        return owners

    def rows(self, rank: int, owner: int) -> tuple[Run, ...]:
        """The keys of ``owner`` that the queries of ``rank`` attend, as the owner's local rows.

        Sender and receiver work this out alike, so it needs no message.
        """
        if not self.rows_needed[rank, owner]:
            return ()
        return union(
            [
                _local(meeting, run, first)
                for first, run in self.k_layout.numbered(owner)
                for keys in self.attended_keys[rank]
                if (meeting := keys & run)
            ]
        )

    def pieces(self, rank: int) -> list[tuple[int, Run, Slice]]:
        """The mask on the queries of ``rank``: (first local index, run, slice) per run."""
        if rank not in self._pieces:
            side = Side.of(((run, first) for first, run in self.q_layout.numbered(rank)))
            meetings = meet(self._table, side)
            self._pieces[rank] = [
                (int(side.tags[run]), side.run(run), part)
                for at, run in enumerate(meetings.run.tolist())
                if (part := meetings.part(at))
            ]
        return self._pieces[rank]

    @cached_property
    def _table(self) -> Table:
        return Table(self.mask.slices)

    def blocks(self, rank: int) -> dict[int, tuple[Slice, ...]]:
        """By owner: the pairs between the queries of ``rank`` and that owner's keys, in local
        indices of both; owners without any are left out."""
        if rank not in self._blocks:
            pieces = self.pieces(rank)
            low = np.array([part.k.start for _, _, part in pieces], np.int64)
            high = np.array([part.k.last for _, _, part in pieces], np.int64)
            by_owner: dict[int, list[Slice]] = {}
            of_piece, of_run = self._keys.overlaps(low, high)
            tags = self._keys.tags[of_run].tolist()
            for at, tag in zip(of_piece.tolist(), tags, strict=True):
                owner, k_first, k_run = self._key_runs[tag]
                if local := _localised(*pieces[at], k_first, k_run):
                    by_owner.setdefault(owner, []).append(local)
            self._blocks[rank] = {owner: tuple(parts) for owner, parts in by_owner.items()}
        return self._blocks[rank]

    @cached_property
    def _key_runs(self) -> list[tuple[int, int, Run]]:
        """(owner, first local row, run) of all keys."""
        ranks = self.k_layout.ranks
        return [(rank, *one) for rank in ranks for one in self.k_layout.numbered(rank)]

    @cached_property
    def _keys(self) -> Side:
        return Side.of((run, tag) for tag, (_, _, run) in enumerate(self._key_runs))


def pack(slices: Iterable[Slice], rows: Sequence[Run], offset: int = 0) -> list[Band]:
    """``slices`` as bands over a buffer that holds the key rows ``rows``, from ``offset`` on."""
    bands = []
    firsts = accumulate(map(len, rows), initial=offset)
    places = list(zip(firsts, rows, strict=False))
    for part in slices:
        for first, run in places:
            if part.k.start > run.last or part.k.last < run.start:
                continue
            whole = run.step == 1 and run.start <= part.k.start and part.k.last <= run.last
            inside = part if whole else part & Slice(part.q, run, part.lo, part.hi)
            bands += [
                Band(band.q, _local(band.k, run, first), band.lo, band.hi)
                for band in inside.bands()
            ]
    return bands


def coalesced(bands: Iterable[Band]) -> tuple[Band, ...]:
    """Full rectangles over the same queries and neighbouring rows made one: fewer, larger calls."""
    joined: list[Band] = []
    for band in sorted(bands, key=lambda b: (b.q.start, b.q.stop, b.q.step, b.k.start)):
        last = joined[-1] if joined else None
        if (
            last
            and last.q == band.q
            and last.k.stop == band.k.start
            and last.k.step == band.k.step == 1
            and last.is_full
            and band.is_full
        ):
            joined[-1] = Band(
                band.q, Run(last.k.start, band.k.stop), last.lo, len(last.k) + len(band.k)
            )
        else:
            joined.append(band)
    return tuple(joined)


def _local(run: Run, owner: Run, first: int) -> Run:
    """A part of the run ``owner`` in local indices, where its first element is ``first``."""
    begin = first + (run.start - owner.start) // owner.step
    stop = first + (run.last - owner.start) // owner.step + 1
    return Run(begin, stop, max(1, run.step // owner.step))


def _localised(q_first: int, q_run: Run, part: Slice, k_first: int, k_run: Run) -> Slice:
    """``part`` on two runs of layouts, its positions replaced by local indices."""
    step = max(q_run.step, k_run.step)
    q, k = part.q & q_run, part.k & k_run
    if not q or not k:
        return NOTHING
    # k - q = step * (k_local - q_local) + shift for every pair of these two runs.
    shift = (k_run.start - step * k_first) - (q_run.start - step * q_first)
    lo, hi = -((shift - part.lo) // step), (part.hi - shift) // step
    return Slice.make(_local(q, q_run, q_first), _local(k, k_run, k_first), lo, hi)
