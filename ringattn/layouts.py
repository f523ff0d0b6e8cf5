"""Layouts: which rank owns which tokens of a sequence, as a short list of runs per rank.

Local order follows the runs, and the runs of a rank ascend, so a rank's tokens always lie in
the order of their global positions. Ranks may own unequal counts, or nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ringattn.runs import Run


@dataclass(frozen=True)
class Layout:
    """``runs[rank]`` are the global positions of that rank's tokens, out of ``n``.

    All runs share one step: a band in positions then is a band in local indices.
    """

    n: int
    runs: tuple[tuple[Run, ...], ...]
    name: str = "custom"

    def __post_init__(self) -> None:
        every = [run for runs in self.runs for run in runs if run]
        steps = {run.step for run in every if len(run) > 1} or {1}
        if len(steps) > 1:
            raise ValueError(f"all runs of a layout must share one step, got {sorted(steps)}")
        # With one step, two runs can only meet in the same residue class: n tokens inside of
        # [0, n) without a meeting are every position once.
        (step,) = steps
        order = sorted((run.start % step, run.start, run.last) for run in every)
        meet = any(a[0] == b[0] and b[1] <= a[2] for a, b in pairwise(order))
        inside = all(run.start >= 0 and run.last < self.n for run in every)
        for rank, runs in enumerate(self.runs):
            if any(a.last >= b.start for a, b in pairwise(runs)):
                raise ValueError(f"the runs of a rank must ascend; those of rank {rank} do not")
        if meet or not inside or sum(map(len, every)) != self.n:
            raise ValueError(f"a layout must own each of the {self.n} positions exactly once")

    @property
    def world(self) -> int:
        return len(self.runs)

    @property
    def ranks(self) -> range:
        return range(len(self.runs))

    def count(self, rank: int) -> int:
        """Number of tokens that ``rank`` owns."""
        return sum(len(run) for run in self.runs[rank])

    def positions(self, rank: int) -> np.ndarray:
        """int64 array: the global position of each local token of ``rank``."""
        parts = [run.to_array() for run in self.runs[rank]]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def shard(self, x: Any, rank: int, dim: int = 1) -> Any:
        """The part of ``x`` (NumPy array or torch tensor) that ``rank`` owns along ``dim``."""
        if x.shape[dim] != self.n:
            raise ValueError(f"shard: dim {dim} has {x.shape[dim]} tokens, the layout {self.n}")
        return x[_at(x.ndim, dim, self.positions(rank))]

    def unshard(self, parts: Sequence[Any], dim: int = 1) -> Any:
        """The inverse of :meth:`shard`, from the parts of all ranks in rank order."""
        if len(parts) != self.world:
            raise ValueError(f"unshard: {len(parts)} parts for a layout of {self.world} ranks")
        dim %= parts[0].ndim
        shape = (*parts[0].shape[:dim], self.n, *parts[0].shape[dim + 1 :])
        make = getattr(parts[0], "new_empty", None)
        whole = make(shape) if make else np.empty(shape, parts[0].dtype)
        for rank, part in enumerate(parts):
            if part.shape[dim] != self.count(rank):
                raise ValueError(
                    f"unshard: part {rank} has {part.shape[dim]} tokens along dim {dim}, "
                    f"rank {rank} owns {self.count(rank)}"
                )
            whole[_at(whole.ndim, dim, self.positions(rank))] = part
        return whole


def _at(ndim: int, dim: int, index: np.ndarray) -> tuple[Any, ...]:
    return (slice(None),) * (dim % ndim) + (index,)


def _checked(n: int, world: int) -> None:
    if n < 0 or world < 1:
        raise ValueError(f"a layout needs n >= 0 and world >= 1, got n={n}, world={world}")


def _cuts(n: int, parts: int) -> list[int]:
    """``parts + 1`` boundaries of near-equal parts (they differ by one at most)."""
    return [n * i // parts for i in range(parts + 1)]


def _joined(runs: list[Run]) -> tuple[Run, ...]:
    """Without empty runs, neighbours made one."""
    joined: list[Run] = []
    for run in (run for run in runs if run):
        if joined and joined[-1].stop == run.start and joined[-1].step == run.step == 1:
            joined[-1] = Run(joined[-1].start, run.stop)
        else:
            joined.append(run)
    return tuple(joined)


def contiguous(n: int, world: int) -> Layout:
    """Rank r owns the r-th of ``world`` near-equal pieces."""
    _checked(n, world)
    at = _cuts(n, world)
    return Layout(n, tuple(_joined([Run(at[r], at[r + 1])]) for r in range(world)), "contiguous")


def zigzag(n: int, world: int) -> Layout:
    """Of ``2 * world`` near-equal pieces rank r owns r and its mirror image: equal causal work."""
    _checked(n, world)
    at = _cuts(n, 2 * world)
    pairs = ((r, 2 * world - 1 - r) for r in range(world))
    runs = tuple(_joined([Run(at[i], at[i + 1]) for i in pair]) for pair in pairs)
    return Layout(n, runs, "zigzag")


def striped(n: int, world: int) -> Layout:
    """Rank r owns positions r, r + world, ... (Brandon et al. 2023, "Striped Attention")."""
    _checked(n, world)
    return Layout(n, tuple(_joined([Run(r, n, world)]) for r in range(world)), "striped")


BUILDERS = {"contiguous": contiguous, "zigzag": zigzag, "striped": striped}
