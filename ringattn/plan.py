"""Plans: a mask cut by a layout, for a schedule, as plain data that any executor can walk.

Per rank a list of steps; per step what is computed (slices in local indices), what is sent to
whom, and what arrives. Work, bytes and balance are read off the same object.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import numpy as np

from ringattn import schedules
from ringattn.layouts import Layout
from ringattn.masks import Mask, Slice
from ringattn.runs import Run
from ringattn.schedules import Step


@dataclass(frozen=True)
class Plan:
    """What every rank computes and exchanges for one mask on one layout.

    Make it with :func:`make_plan`, once per batch; all layers share it.
    """

    mask: Mask
    layout: Layout
    schedule: str
    _steps: dict[int, tuple[Step, ...]] = field(default_factory=dict, compare=False, repr=False)
    _rows: dict[int, list[tuple[int, Run, Slice]]] = field(
        default_factory=dict, compare=False, repr=False
    )
    _blocks: dict[tuple[int, int], tuple[Slice, ...]] = field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def world(self) -> int:
        return self.layout.world

    def steps(self, rank: int) -> tuple[Step, ...]:
        """The steps of ``rank``; worked out on first use and kept."""
        if rank not in self._steps:
            self._steps[rank] = schedules.BUILDERS[self.schedule](self, rank)
        return self._steps[rank]

    def block(self, q_rank: int, k_rank: int) -> tuple[Slice, ...]:
        """The pairs between the queries of one rank and the keys of another, in local indices."""
        key = (q_rank, k_rank)
        if key not in self._blocks:
            parts = [
                local
                for q_first, q_run, part in self._own_rows(q_rank)
                for k_first, k_run in _numbered(self.layout.runs[k_rank])
                if (local := _localised(part, q_first, q_run, k_first, k_run))
            ]
            self._blocks[key] = tuple(_coalesced(parts))
        return self._blocks[key]

    @cached_property
    def reach(self) -> tuple[int, ...]:
        """Per rank: how many hops its K/V must make when they pass from rank to rank + 1."""
        return tuple(self._reach(owner) for owner in self.layout.ranks)

    def _reach(self, owner: int) -> int:
        starts, lasts, ranks = self._run_ends
        hops: set[int] = set()
        for run in self.layout.runs[owner]:
            column = Slice(Run(0, self.mask.n_q), run, -self.mask.n_q, self.mask.n_k)
            for part in (part for whole in self.mask.slices if (part := whole & column)):
                near = ranks[(starts <= part.q.last) & (lasts >= part.q.start)]
                hops.update(((near - owner) % self.world).tolist())
        # Ranges of queries say who may attend; with steps they say too much, so it is checked.
        busy = (hop for hop in sorted(hops, reverse=True) if hop)
        return next((hop for hop in busy if self.block((owner + hop) % self.world, owner)), 0)

    @cached_property
    def _run_ends(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(first position, last position, rank) of every run of the layout."""
        ends = [
            (run.start, run.last, rank)
            for rank in self.layout.ranks
            for run in self.layout.runs[rank]
        ]
        starts, lasts, ranks = np.array(ends, np.int64).reshape(-1, 3).T
        return starts, lasts, ranks

    def _own_rows(self, rank: int) -> list[tuple[int, Run, Slice]]:
        """The mask restricted to the queries of ``rank``, so that cutting by key owner is cheap."""
        if rank not in self._rows:
            all_keys = Run(0, self.mask.n_k)
            bounds = (-self.mask.n_q, self.mask.n_k)
            self._rows[rank] = [
                (first, run, part)
                for first, run in _numbered(self.layout.runs[rank])
                for whole in self.mask.slices
                if (part := whole & Slice(run, all_keys, *bounds))
            ]
        return self._rows[rank]

    def area(self, rank: int) -> int:
        """Number of (query, key) pairs that ``rank`` computes."""
        return sum(part.area for _, _, part in self._own_rows(rank))

    def recv_tokens(self, rank: int) -> int:
        """Number of K/V rows that ``rank`` receives in one forward pass."""
        return sum(move.tokens for step in self.steps(rank) for move in step.recvs)

    def grad_recv_tokens(self, rank: int) -> int:
        """Number of dK/dV rows (float32) that ``rank`` receives in one backward pass."""
        return sum(move.tokens for step in self.steps(rank) for move in step.grad_recvs)

    @cached_property
    def imbalance(self) -> float:
        """Largest area of a rank over the mean area; 1.0 is perfect, and so is no work at all."""
        areas = [self.area(rank) for rank in self.layout.ranks]
        return max(areas) * len(areas) / sum(areas) if sum(areas) else 1.0


def make_plan(mask: Mask, layout: Layout, schedule: str = "ring", ulysses: int = 1) -> Plan:
    """Plan ``mask`` on ``layout``.

    Raises ValueError when the mask does not fit the layout, or when the schedule or the ulysses
    degree is not one that this version executes: nothing is ever dropped in silence.
    """
    if schedule not in schedules.BUILDERS:
        legal = ", ".join(schedules.BUILDERS)
        raise ValueError(f"schedule={schedule!r} is not available; choose one of: {legal}")
    if ulysses != 1:
        raise ValueError(f"ulysses={ulysses} is not available; choose one of: 1")
    if mask.n_q != layout.n or mask.n_k != layout.n:
        raise ValueError(
            f"the mask is {mask.n_q} queries x {mask.n_k} keys, the layout has {layout.n} tokens"
        )
    return Plan(mask, layout, schedule)


def _numbered(runs: tuple[Run, ...]) -> list[tuple[int, Run]]:
    """Each run with the local index of its first token."""
    return list(zip(accumulate((len(run) for run in runs), initial=0), runs, strict=False))


def _localised(part: Slice, q_first: int, q_run: Run, k_first: int, k_run: Run) -> Slice:
    """``part`` on two runs of a layout, its positions replaced by local indices."""
    step = max(q_run.step, k_run.step)
    q, k = part.q & q_run, part.k & k_run

    def local(run: Run, owner: Run, first: int) -> Run:
        begin = first + (run.start - owner.start) // step
        stop = first + (run.last - owner.start) // step + 1
        return Run(begin, stop, max(1, run.step // step))

    if not q or not k:
        return Slice.make(q, k)
    # k - q = step * (k_local - q_local) + shift for every pair of these two runs.
    shift = (k_run.start - step * k_first) - (q_run.start - step * q_first)
    lo, hi = -((shift - part.lo) // step), (part.hi - shift) // step
    return Slice.make(local(q, q_run, q_first), local(k, k_run, k_first), lo, hi)


def _coalesced(parts: list[Slice]) -> list[Slice]:
    """Neighbouring full rectangles over the same queries made one: fewer, larger kernel calls."""
    joined: list[Slice] = []
    for part in parts:
        before = joined[-1] if joined else None
        if (
            before
            and before.q == part.q
            and before.is_full
            and part.is_full
            and before.k.step == part.k.step == 1
            and before.k.stop == part.k.start
        ):
            joined[-1] = Slice.make(part.q, Run(before.k.start, part.k.stop))
        else:
            joined.append(part)
    return joined
