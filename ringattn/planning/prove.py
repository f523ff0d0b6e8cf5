"""Proves a plan: every pair once, every row and gradient where it belongs, no deadlock.

First the plan must be well-formed: rows, blocks and peers exist, no row is named twice in a move.
Then every rank is walked in lock step with a toy attention in exact 64-bit integers: each query and
each key has a random weight (another one for every member of a ulysses group, so heads cannot be
mixed up), a query's output is the sum of the weights of the keys it was computed with, a key's
gradient the sum of those of its queries. The mask alone gives what both must be. A pair that is
missing, doubled or computed with the wrong row, or a gradient that is lost or counted twice,
changes a sum; that it does not show has a chance of about 2**-60. A row of a block is received once
and used only in later steps, so nothing is overwritten or read while it is on its way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ringattn.planning.buffers import buffers
from ringattn.planning.masks import Mask
from ringattn.planning.plan import Plan
from ringattn.planning.runs import Run
from ringattn.planning.schedules import Move, RankPlan, Step
from ringattn.planning.slices import Band

_MISSING = -1  # a row of a block that has not arrived


@dataclass(frozen=True)
class RankReport:
    """Of one rank: pairs computed (with ulysses: of a part of the heads), K/V and gradient rows
    received, largest numbers of rows of foreign K/V and gradients alive at a time."""

    area: int
    recv_tokens: int
    grad_recv_tokens: int
    peak_tokens: int
    peak_grad_tokens: int


@dataclass
class Report:
    """``problems`` is empty for a correct plan; each is one line. ``ranks`` is empty where the plan
    is malformed."""

    ranks: list[RankReport]
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


def check(plan: Plan) -> Report:
    """Walks ``plan`` on all ranks. Time is that of ``world * steps`` vector operations over the
    tokens of a rank: seconds at 64 ranks and a million tokens."""
    return _Check(plan).run()


class _Check:
    def __init__(self, plan: Plan) -> None:
        self.plan, self.problems = plan, []
        mask, partition = plan.mask, plan.partition
        weights = np.random.default_rng(0)
        # Keys and queries of member m of a group are numbered from m * n_k and m * n_q on.
        self.f, self.g = (
            weights.integers(1, 2**63, plan.ulysses * n, dtype=np.uint64) | np.uint64(1)
            for n in (mask.n_q, mask.n_k)
        )
        places = [divmod(rank, plan.ulysses) for rank in range(plan.world)]
        self.own = [partition.q_layout.positions(g) + m * mask.n_q for g, m in places]
        self.walkers = [
            _Walker(
                plan.rank(rank),
                partition.k_layout.positions(g) + m * mask.n_k,
                self.f[self.own[rank]],
                self.g,
            )
            for rank, (g, m) in enumerate(places)
        ]

    def run(self) -> Report:
        for rank, walker in enumerate(self.walkers):
            faults = _malformed(walker.plan, rank, self.plan.world, len(walker.keys), len(walker.f))
            self.problems += [f"rank {rank}, {fault}" for fault in faults]
        return Report([], self.problems) if self.problems else self._walk()

    def _walk(self) -> Report:
        lengths = sorted({len(w.plan.steps) for w in self.walkers})
        if len(lengths) > 1:
            self.problems.append(f"ranks do not exchange equally often: {lengths} steps")
        arrivals: list[list[tuple[Move, np.ndarray]]] = [[] for _ in self.walkers]
        for index in range(lengths[-1]):
            steps = [
                w.plan.steps[index] if index < len(w.plan.steps) else Step(0, ())
                for w in self.walkers
            ]
            rows = self._exchange(index, "K/V", steps, "sends", "recvs", _Walker.read)
            for walker, step, came in zip(self.walkers, steps, arrivals, strict=True):
                walker.compute(step)
                walker.collect(came)
            arrivals = self._exchange(
                index, "gradient", steps, "grad_sends", "grad_recvs", _Walker.read_grad
            )
            for walker, came in zip(self.walkers, rows, strict=True):
                walker.arrive(came)
                walker.forget(index)
        for walker, came in zip(self.walkers, arrivals, strict=True):
            walker.collect(came)
        self._verdict()
        ranks = [self._summary(rank) for rank in range(self.plan.world)]
        if sum(rank.area for rank in ranks) != self.plan.mask.area * self.plan.ulysses:
            self.problems.append("the pairs of all ranks are not as many as the mask has")
        return Report(ranks, self.problems)

    def _exchange(self, index, what, steps: Sequence[Step], out: str, into: str, read):
        """What every rank receives. Messages between two ranks match in their order: since all
        exchanges of a step start together, matched messages are also free of deadlock."""
        posted: dict[tuple[int, int], list[np.ndarray]] = {}
        for rank, step in enumerate(steps):
            for move in getattr(step, out):
                posted.setdefault((rank, move.peer), []).append(read(self.walkers[rank], move))
        received: list[list[tuple[Move, np.ndarray]]] = [[] for _ in steps]
        for rank, step in enumerate(steps):
            for move in getattr(step, into):
                queue = posted.get((move.peer, rank))
                if not queue or len(queue[0]) != move.tokens:
                    sent = f"{len(queue[0])} rows" if queue else "nothing"
                    self.problems.append(
                        f"step {index}: rank {rank} waits for {move.tokens} {what} rows of rank "
                        f"{move.peer}, which sends {sent}"
                    )
                    continue
                received[rank].append((move, queue.pop(0)))
        for (sender, reader), queue in posted.items():
            if queue:
                self.problems.append(
                    f"step {index}: rank {sender} sends {what} rows that rank {reader} does not "
                    "receive"
                )
        return received

    def _verdict(self) -> None:
        plan = self.plan
        sums = [
            _expected(plan.mask, f, g)
            for f, g in zip(
                np.split(self.f, plan.ulysses), np.split(self.g, plan.ulysses), strict=True
            )
        ]
        out, dk = (np.concatenate(parts) for parts in zip(*sums, strict=True))
        for rank, walker in enumerate(self.walkers):
            self.problems += [f"rank {rank}: {problem}" for problem in walker.problems]
            wrong = np.flatnonzero(walker.out != out[self.own[rank]])
            if len(wrong):
                position = self.own[rank][wrong[0]] % plan.mask.n_q
                self.problems.append(
                    f"rank {rank}: {len(wrong)} queries, the first at position {position}, do not "
                    "see each of their keys once"
                )
            wrong = np.flatnonzero(walker.grads[0] != dk[walker.keys])
            if len(wrong):
                self.problems.append(
                    f"rank {rank}: the gradients of {len(wrong)} keys, the first at position "
                    f"{walker.keys[wrong[0]] % plan.mask.n_k}, are not the sum over their queries"
                )
            if (split := plan.heads(rank)) is not None:
                self._check_split(rank, split)

    def _check_split(self, rank: int, split) -> None:
        plan, group = self.plan, rank // self.plan.ulysses
        if split.members[split.member] != rank:
            self.problems.append(f"rank {rank}: takes another's place in its group")
        for rows, whole, layout in (
            (split.q_rows, plan.partition.q_layout, plan.layout),
            (split.k_rows, plan.partition.k_layout, plan.key_layout),
        ):
            positions = whole.positions(group)
            for member, some in zip(split.members, rows, strict=True):
                at = [i for run in some for i in run.to_array().tolist()]
                if not np.array_equal(positions[at], layout.positions(member)):
                    self.problems.append(f"rank {rank}: misplaces the tokens of rank {member}")

    def _summary(self, rank: int) -> RankReport:
        own = self.plan.rank(rank)
        peaks = buffers(own)
        return RankReport(
            area=sum(band.area for step in own.steps for band in step.bands),
            recv_tokens=sum(move.tokens for step in own.steps for move in step.recvs),
            grad_recv_tokens=sum(move.tokens for step in own.steps for move in step.grad_recvs),
            peak_tokens=peaks.kv,
            peak_grad_tokens=peaks.grads,
        )


class _Walker:
    """One rank: which key (by position) each row of its blocks is, and its sums so far."""

    def __init__(self, plan: RankPlan, keys: np.ndarray, f: np.ndarray, g: np.ndarray) -> None:
        self.plan, self.keys, self.f, self.g = plan, keys, f, g
        self.blocks = {0: keys}
        self.out = np.zeros(len(f), np.uint64)
        self.grads = {0: np.zeros(len(keys), np.uint64)}
        self.problems: list[str] = []

    def read(self, move: Move) -> np.ndarray:
        rows = _at(move.rows)
        keys = self.blocks.get(move.block)
        if keys is None or (keys[rows] == _MISSING).any():
            self.problems.append(f"sends rows of block {move.block} that it does not hold")
            return np.full(len(rows), _MISSING)
        return keys[rows]

    def read_grad(self, move: Move) -> np.ndarray:
        return self._grad(move.block)[_at(move.rows)]

    def _grad(self, block: int) -> np.ndarray:
        return self.grads.setdefault(block, np.zeros(self.plan.blocks[block], np.uint64))

    def compute(self, step: Step) -> None:
        if not step.bands:
            return
        keys = self.blocks.get(step.block)
        for band in step.bands:
            k = slice(band.k.start, band.k.stop, band.k.step)
            q = slice(band.q.start, band.q.stop, band.q.step)
            if keys is None or (keys[k] == _MISSING).any():
                self.problems.append(f"computes on rows of block {step.block} that have not come")
                return
            seen, seeing = _sums(band, self.f[q], self.g[keys[k]])
            self.out[q] += seen
            self._grad(step.block)[k] += seeing

    def arrive(self, came: Sequence[tuple[Move, np.ndarray]]) -> None:
        for move, keys in came:
            block = self.blocks.setdefault(
                move.block, np.full(self.plan.blocks[move.block], _MISSING)
            )
            if (block[_at(move.rows)] != _MISSING).any():
                self.problems.append(f"receives rows of block {move.block} that it holds already")
            block[_at(move.rows)] = keys

    def collect(self, came: Sequence[tuple[Move, np.ndarray]]) -> None:
        for move, sums in came:
            np.add.at(self._grad(move.block), _at(move.rows), sums)

    def forget(self, index: int) -> None:
        for block in self.plan.blocks_done(index):
            self.blocks.pop(block, None)
        for block in self.plan.grads_done(index):
            self.grads.pop(block, None)


def _malformed(plan: RankPlan, rank: int, world: int, keys: int, queries: int) -> list[str]:
    """What makes the steps of ``rank`` meaningless, before any is walked."""
    if not plan.blocks or plan.blocks[0] != keys:
        return [f"block 0 must be its own {keys} keys, got blocks {plan.blocks}"]
    faults = []

    def outside(runs: Sequence[Run], size: int) -> bool:
        return any(run.start < 0 or run.stop > size for run in runs)

    for index, step in enumerate(plan.steps):
        if not 0 <= step.block < len(plan.blocks):
            faults.append(f"step {index}: computes on block {step.block}, which does not exist")
            continue
        for band in step.bands:
            if outside([band.q], queries) or outside([band.k], plan.blocks[step.block]):
                faults.append(f"step {index}: {band} reaches outside of queries or block")
        for kind in ("sends", "recvs", "grad_sends", "grad_recvs"):
            for move in getattr(step, kind):
                where = f"step {index}: {kind} {move}"
                if not 0 <= move.peer < world or move.peer == rank:
                    faults.append(f"{where} names no other rank")
                elif not 0 <= move.block < len(plan.blocks):
                    faults.append(f"{where} names no block")
                elif not move.tokens or outside(move.rows, plan.blocks[move.block]):
                    faults.append(f"{where} names no rows, or rows outside of the block")
                elif len(np.unique(_at(move.rows))) != move.tokens:
                    faults.append(f"{where} names a row twice")
                elif kind == "recvs" and move.block == 0:
                    faults.append(f"{where} overwrites the rank's own keys")
    return faults


def _at(rows: Sequence[Run]) -> np.ndarray:
    return np.concatenate([run.to_array() for run in rows])


def _sums(band: Band, f: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(per query the sum of g over its keys, per key the sum of f over its queries)."""

    def windowed(weights: np.ndarray, count: int, lo: int, hi: int) -> np.ndarray:
        before = np.concatenate([np.zeros(1, np.uint64), np.cumsum(weights)])
        at = np.arange(count)
        low, high = (np.clip(at + x, 0, len(weights)) for x in (lo, hi + 1))
        return before[np.maximum(low, high)] - before[low]

    return windowed(g, len(f), band.lo, band.hi), windowed(f, len(g), -band.hi, -band.lo)


def _expected(mask: Mask, f: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sums per query and per key, from the slices of the mask alone."""
    out, dk = np.zeros(mask.n_q, np.uint64), np.zeros(mask.n_k, np.uint64)
    for part in mask.slices:
        for band in part.bands():
            q, k = (slice(run.start, run.stop, run.step) for run in (band.q, band.k))
            seen, seeing = _sums(band, f[q], g[k])
            out[q] += seen
            dk[k] += seeing
    return out, dk
