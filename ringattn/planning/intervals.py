"""Where slices and runs meet, for many of both at once: NumPy arrays instead of loops.

A *side* is a list of disjoint runs with one common step, as three arrays. Every answer here is
exact; cases that the closed forms do not cover go through the algebra of single slices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ringattn.planning.runs import Run
from ringattn.planning.slices import Slice


@dataclass(frozen=True)
class Side:
    """Runs of one step: ``starts``, ``lasts`` and the caller's ``tags`` (a rank, a chunk)."""

    starts: np.ndarray
    lasts: np.ndarray
    tags: np.ndarray
    step: int

    @classmethod
    def of(cls, runs: Iterable[tuple[Run, int]]) -> Side:
        """From (run, tag) pairs; empty runs are left out."""
        kept = [(run.start, run.last, run.step, tag) for run, tag in runs if run]
        starts, lasts, steps, tags = np.array(kept, np.int64).reshape(-1, 4).T
        step = int(steps.max(initial=1))
        order = np.argsort(starts, kind="stable")
        return cls(starts[order], lasts[order], tags[order], step)

    def overlaps(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(interval index, run index) of every run whose span meets ``low[i] <= x <= high[i]``."""
        if self.step > 1:
            return np.nonzero((self.starts <= high[:, None]) & (self.lasts >= low[:, None]))
        first = np.searchsorted(self.lasts, low)
        count = np.maximum(np.searchsorted(self.starts, high, side="right") - first, 0)
        interval = np.repeat(np.arange(len(low)), count)
        within = np.arange(len(interval)) - np.repeat(np.cumsum(count) - count, count)
        return interval, first[interval] + within

    def run(self, index: int) -> Run:
        return Run(int(self.starts[index]), int(self.lasts[index]) + 1, self.step)

    def counts(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Per run: how many of its elements lie in the ascending disjoint ``[start, stop)``."""
        if self.step > 1:
            bounds = np.stack([starts, stops])[..., None]
            below = -((self.starts - bounds) // self.step)  # elements of the run below each bound
            below = np.clip(below, 0, (self.lasts - self.starts) // self.step + 1)
            return (below[1] - below[0]).sum(0)
        before = np.concatenate([[0], np.cumsum(stops - starts)])

        def below(x: np.ndarray) -> np.ndarray:
            """How many positions of the intervals lie below each x."""
            at = np.searchsorted(starts, x, side="right")
            return before[at] - np.where(at > 0, np.maximum(stops[at - 1] - x, 0), 0)

        return below(self.lasts + 1) - below(self.starts)


class Table:
    """The slices of a mask as arrays."""

    def __init__(self, slices: Sequence[Slice]) -> None:
        self.slices = slices
        rows = [
            (s.q.start, s.q.last, s.q.step, s.k.start, s.k.last, s.k.step, s.lo, s.hi)
            for s in slices
        ]
        columns = np.array(rows, np.int64).reshape(-1, 8).T
        self.q0, self.q1, self.qs, self.k0, self.k1, self.ks, self.lo, self.hi = columns


@dataclass(frozen=True)
class Meetings:
    """Every slice of ``table`` that shares queries with a run of ``side``.

    ``at`` and ``run`` index them. ``first``/``last``/``step`` are the queries they share; where
    ``irregular`` both have steps and the shared queries are left to the algebra.
    """

    table: Table
    side: Side
    at: np.ndarray
    run: np.ndarray
    first: np.ndarray
    last: np.ndarray
    step: np.ndarray
    irregular: np.ndarray

    @property
    def tags(self) -> np.ndarray:
        return self.side.tags[self.run]

    def part(self, index: int) -> Slice:
        """The slice on the queries of the run; may be empty."""
        whole = self.table.slices[self.at[index]]
        run = self.side.run(int(self.run[index]))
        return whole & Slice(run, whole.k, whole.lo, whole.hi)

    def areas(self) -> np.ndarray:
        """int64: pairs per meeting."""
        t, at = self.table, self.at
        below = [
            _pairs_below(self.first, self.last, self.step, t.k0[at], t.k1[at], bound)
            for bound in (t.hi[at], t.lo[at] - 1)
        ]
        areas = below[0] - below[1]
        for index in np.nonzero(self.irregular | (t.ks[at] > 1))[0].tolist():
            areas[index] = self.part(index).area
        return areas

    def attended(self) -> list[tuple[int, Run]]:
        """(tag, run of keys) for all keys with at least one of the shared queries."""
        t, at = self.table, self.at
        step = t.ks[at]
        low = np.maximum(t.k0[at], self.first + t.lo[at])
        high = np.minimum(t.k1[at], self.last + t.hi[at])
        low = t.k0[at] + -((t.k0[at] - low) // step) * step
        # Every key in between sees a query if the band is at least as wide as their step.
        sparse = self.irregular | (t.hi[at] - t.lo[at] + 1 < self.step)
        dense = np.nonzero(~sparse & (low <= high))[0]
        runs = [
            (tag, Run(start, stop, by))
            for tag, start, stop, by in zip(
                self.tags[dense].tolist(),
                low[dense].tolist(),
                (high[dense] + 1).tolist(),
                step[dense].tolist(),
                strict=True,
            )
        ]
        tags = self.tags
        for index in np.nonzero(sparse)[0].tolist():
            runs += [(int(tags[index]), run) for run in attended_keys(self.part(index))]
        return runs


def meet(table: Table, side: Side) -> Meetings:
    """All meetings of the queries of ``table`` with the runs of ``side``."""
    at, run = side.overlaps(table.q0, table.q1)
    start, last, steps = table.q0[at], table.q1[at], table.qs[at]
    r0, r1 = side.starts[run], side.lasts[run]
    irregular = (steps > 1) & (side.step > 1)
    # At most one of the two has a step: the shared queries are that one, clipped to the other.
    stepped = steps > 1
    origin, step = np.where(stepped, start, r0), np.where(stepped, steps, side.step)
    low, high = np.maximum(start, r0), np.minimum(last, r1)
    first = origin + -((origin - low) // step) * step
    end = origin + (high - origin) // step * step
    kept = irregular | (first <= end)
    columns = (at, run, first, end, step, irregular)
    return Meetings(table, side, *(column[kept] for column in columns))


def _pairs_below(first, last, step, k0, k1, bound) -> np.ndarray:
    """Pairs with ``k - q <= bound`` over queries first, first + step, ... and keys k0 .. k1."""
    count = (last - first) // step + 1
    none = np.clip(-((first + bound - k0) // step), 0, count)  # queries that see no key
    part = np.clip(-((first + bound - k1) // step), 0, count)  # and those that do not see all
    sloped = part - none
    seen = first + none * step + bound - k0 + 1  # by the first query that sees any
    return sloped * seen + step * (sloped * (sloped - 1) // 2) + (count - part) * (k1 - k0 + 1)


def attended_keys(part: Slice) -> list[Run]:
    """The keys of a slice that have at least one query, as disjoint runs."""
    if not part:
        return []
    step, width = part.q.step, part.hi - part.lo + 1
    if width >= step or part.is_full:
        return (
            [run] if (run := part.k.clip(part.q.start + part.lo, part.q.last + part.hi + 1)) else []
        )
    offsets = range(part.lo, part.hi + 1)
    runs = (Run(part.q.start + d, part.q.last + d + 1, step) & part.k for d in offsets)
    return [run for run in runs if run]


def union(runs: Sequence[Run]) -> tuple[Run, ...]:
    """The set of all elements as few disjoint runs, in the order of their starts."""
    if any(run.step > 1 for run in runs):
        base = min(run.start for run in runs)
        present = np.zeros(max(run.stop for run in runs) - base, bool)
        for run in runs:
            present[run.start - base : run.stop - base : run.step] = True
        return tuple(progressions(np.nonzero(present)[0] + base))
    joined: list[list[int]] = []
    for run in sorted(runs, key=lambda run: run.start):
        if joined and run.start <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], run.stop)
        else:
            joined.append([run.start, run.stop])
    return tuple(Run(start, stop) for start, stop in joined)


def progressions(values: np.ndarray) -> list[Run]:
    """Ascending integers as runs, greedily: each run is as long as its first gap allows."""
    gaps = np.diff(values)
    changes = np.append(np.nonzero(np.diff(gaps))[0] + 1, len(gaps)).tolist()
    runs, at, change = [], 0, 0
    while at < len(values):
        while change < len(changes) and changes[change] <= at:
            change += 1
        end = changes[change] if change < len(changes) else at
        step = int(gaps[at]) if end > at else 1
        runs.append(Run(int(values[at]), int(values[end]) + 1, step))
        at = end + 1
    return runs
