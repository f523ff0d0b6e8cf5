"""Layouts: which rank owns which tokens of a sequence, as a short list of runs per rank.

Local order follows the runs, which ascend by their starts. Ranks may own unequal counts, or
nothing. In all builders ``n`` is the number of tokens and ``world`` that of ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from ringattn.planning.intervals import Side, Table, meet
from ringattn.planning.masks import Mask
from ringattn.planning.runs import Run, integer

_SHOWN = 16  # ranks that a printed layout shows
_TOLERANCE = 0.01  # of balanced: largest work over the mean, less 1


@dataclass(frozen=True)
class Layout:
    """``runs[rank]`` are the global positions of that rank's tokens, out of ``n``; ``name`` is for
    people.

    All runs share one step: a band in positions then is a band in local indices.
    """

    n: int
    runs: tuple[tuple[Run, ...], ...]
    name: str = "custom"

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", tuple(map(tuple, self.runs)))
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
            if any(a.start >= b.start for a, b in pairwise(runs)):
                raise ValueError(f"the runs of a rank must ascend; those of rank {rank} do not")
        if meet or not inside or sum(map(len, every)) != self.n:
            raise ValueError(f"a layout must own each of the {self.n} positions exactly once")

    def __str__(self) -> str:
        owned = (", ".join(map(str, runs)) or "nothing" for runs in self.runs[:_SHOWN])
        lines = "".join(f"\n  rank {rank}: {text}" for rank, text in enumerate(owned))
        more = self.world - _SHOWN
        rest = f"\n  and {more} ranks more" if more > 0 else ""
        return f"{self.name}, {self.n} tokens over {self.world} ranks{lines}{rest}"

    @property
    def world(self) -> int:
        """Number of ranks."""
        return len(self.runs)

    @property
    def ranks(self) -> range:
        """0 up to ``world``."""
        return range(len(self.runs))

    @cached_property
    def step(self) -> int:
        """The step that all runs share."""
        return max((run.step for runs in self.runs for run in runs), default=1)

    @property
    def owned(self) -> Iterator[tuple[Run, int]]:
        """Every run with its rank."""
        return ((run, rank) for rank, runs in enumerate(self.runs) for run in runs)

    def numbered(self, rank: int) -> list[tuple[int, Run]]:
        """The runs of ``rank``, each with the local index of its first token."""
        runs = self.runs[rank]
        return list(zip(accumulate(map(len, runs), initial=0), runs, strict=False))

    def count(self, rank: int) -> int:
        """Number of tokens that ``rank`` owns."""
        return sum(len(run) for run in self.runs[rank])

    def positions(self, rank: int) -> np.ndarray:
        """int64 array: the global position of each local token of ``rank``."""
        parts = [run.to_array() for run in self.runs[rank]]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def merged(self, size: int, join: bool = False) -> Layout:
        """The layout of groups of ``size`` neighbouring ranks, each as if it were one rank.

        ``join`` makes neighbouring runs one, which gives single tokens a step of 1.
        """
        groups = range(0, self.world, size)
        runs = (sorted(sum(self.runs[g : g + size], ()), key=lambda run: run.start) for g in groups)
        return Layout(self.n, tuple(_joined(r) if join else tuple(r) for r in runs), self.name)

    def shard(self, x: Any, rank: int, dim: int = 1) -> Any:
        """The part of ``x`` (NumPy array or torch tensor) that ``rank`` owns along ``dim``.
        Raises ValueError where that has not ``n`` tokens, or there is no such dim or rank."""
        if not -x.ndim <= dim < x.ndim:
            raise ValueError(f"shard: no dim {dim} in {list(x.shape)}; give dim= of the tokens")
        if not 0 <= rank < self.world:
            raise ValueError(f"shard: rank {rank} of a layout for ranks 0 to {self.world - 1}")
        if x.shape[dim] != self.n:
            raise ValueError(f"shard: dim {dim} has {x.shape[dim]} tokens, the layout {self.n}")
        return x[_at(x.ndim, dim, self.positions(rank))]

    def unshard(self, parts: Sequence[Any], dim: int = 1) -> Any:
        """The inverse of :meth:`shard` along ``dim``, from the parts of all ranks in rank order.
        Raises ValueError for another number of parts."""
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
    integer("n", n, 0)
    integer("world", world, 1)


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


def balanced(mask: Mask | Sequence[Mask], world: int, chunk: int | None = None) -> Layout:
    """Equal token counts (to one chunk) and near-equal work for ``mask``; for a list of masks, one
    for each layer, near-equal sums of their work.

    The queries are cut into chunks of ``chunk`` tokens, the last one shorter. Heavy chunks go
    first, each to the rank with the least work that still has room; then chunks are exchanged
    between the most loaded rank and others while that helps. With ``chunk=None`` there are two
    near-equal chunks a rank, then four, eight, ... up to 32, until the largest work is within 1 %
    of the mean.

    Queries only: for unequal lengths give the keys a layout of their own. Raises ValueError for
    a chunk below 1.
    """
    layers = Counter(mask if isinstance(mask, Sequence) else [mask])
    if not layers or not all(isinstance(each, Mask) for each in layers):
        raise ValueError(f"balanced needs a mask or a list of masks, then the world; got {mask!r}")
    n = _queries(layers)
    _checked(n, world)
    if chunk is not None:
        integer("chunk", chunk, 1)
    tables = [(Table(each.slices), count) for each, count in layers.items()]
    if chunk is not None:
        return _dealt(tables, [*range(0, n, chunk), n], world)[0]
    best, least = _dealt(tables, _cuts(n, world), world)
    for per_rank in (2, 4, 8, 16, 32):
        # Chunks differ by a token; as many of them as tokens in one would add up to a chunk.
        if least <= 1 + _TOLERANCE or per_rank * per_rank * world > n:
            break
        layout, imbalance = _dealt(tables, _cuts(n, per_rank * world), world)
        if imbalance < least:
            best, least = layout, imbalance
    return best


def _queries(masks: Iterable[Mask]) -> int:
    """The number of queries that the masks share."""
    sizes = {mask.n_q for mask in masks}
    if len(sizes) > 1:
        raise ValueError(f"masks of one layout need equal lengths, got {sorted(sizes)}")
    return sizes.pop()


def _dealt(tables: list[tuple[Table, int]], cuts: list[int], world: int) -> tuple[Layout, float]:
    """(layout, largest work over the mean) for the chunks between the cuts; each table counts so
    often."""
    edges = np.array(cuts, np.int64)
    chunks = len(cuts) - 1
    filled = edges[1:] > edges[:-1]
    side = Side(edges[:-1][filled], edges[1:][filled] - 1, np.arange(chunks)[filled], 1)
    work = np.zeros(chunks, np.int64)
    for table, count in tables:
        meetings = meet(table, side)
        np.add.at(work, meetings.tags, count * meetings.areas())
    owner = _assigned(work, world)
    load = np.bincount(owner, work, world)
    runs: list[list[Run]] = [[] for _ in range(world)]
    for at, rank in enumerate(owner.tolist()):
        runs[rank].append(Run(int(edges[at]), int(edges[at + 1])))
    imbalance = float(load.max() / load.mean()) if load.any() else 1.0
    return Layout(cuts[-1], tuple(_joined(some) for some in runs), "balanced"), imbalance


def _assigned(work: np.ndarray, world: int) -> np.ndarray:
    """The rank of every chunk: equal numbers of chunks, to one, and near-equal sums of work.

    Heavy chunks first, to the rank with the least work; but to the rank of a neighbouring chunk
    where that is no further ahead than its number of chunks says: neighbours share keys. The last
    chunk, which may be short, stays with rank 0, which has the most chunks: so token counts differ
    by one chunk at most.
    """
    room = np.full(world, len(work) // world)
    room[: len(work) % world] += 1
    # Work of one chunk. Where most have the same, that counts: the first of a window have less.
    fair = max(work.mean(), np.median(work)) * (1 + _TOLERANCE / 4) if len(work) else 0
    owner = np.full(len(work), -1, np.int64)
    load, taken = np.zeros(world, np.int64), np.zeros(world, np.int64)
    least = [(0, rank) for rank in range(world)]

    def give(chunk: int, rank: int) -> None:
        owner[chunk] = rank
        taken[rank] += 1
        load[rank] += work[chunk]
        if taken[rank] < room[rank]:
            heappush(least, (int(load[rank]), rank))

    if len(work):
        give(len(work) - 1, 0)
    for chunk in np.argsort(-work[:-1], kind="stable").tolist():
        beside = (owner[at] for at in (chunk - 1, chunk + 1) if at >= 0 and owner[at] >= 0)
        for rank in beside:
            ahead = load[rank] + work[chunk] > fair * (taken[rank] + 1)
            if taken[rank] < room[rank] and not ahead:
                give(chunk, rank)
                break
        else:
            while load[least[0][1]] != least[0][0] or taken[least[0][1]] == room[least[0][1]]:
                heappop(least)  # what was true before the rank got more
            give(chunk, heappop(least)[1])
    mean = load.mean()
    for _ in range(4 * world):
        # The exchange that takes most off the fullest rank without filling another as far.
        full = int(load.argmax())
        mine, others = np.flatnonzero(owner[:-1] == full), np.flatnonzero(owner[:-1] != full)
        if load[full] <= (1 + _TOLERANCE / 2) * mean or not len(others) or not len(mine):
            break
        moved = work[mine][:, None] - work[others][None, :]
        after = np.maximum(load[full] - moved, load[owner[others]][None, :] + moved)
        ours, theirs = np.unravel_index(after.argmin(), after.shape)
        if after[ours, theirs] >= load[full]:
            break
        rank, change = owner[others[theirs]], moved[ours, theirs]
        owner[mine[ours]], owner[others[theirs]] = rank, full
        load[full] -= change
        load[rank] += change
    return owner


BUILDERS = {"contiguous": contiguous, "zigzag": zigzag, "striped": striped}


def build(name: str, mask: Mask | Sequence[Mask], world: int) -> Layout:
    """The layout called ``name`` (of :data:`NAMES`) for the queries of ``mask``, or of the masks of
    all layers.

    Raises ValueError for an unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"layout={name!r} is unknown; choose one of: {', '.join(NAMES)}")
    if name == "balanced":
        return balanced(mask, world)
    return BUILDERS[name](_queries([mask] if isinstance(mask, Mask) else mask), world)


NAMES = (*BUILDERS, "balanced")
