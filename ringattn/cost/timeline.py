"""One attention layer in time: the steps of a plan as the executor walks them, exchanges behind
kernels. Written for :mod:`ringattn.execution.executor`; a change there is a change here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ringattn.cost.hardware import Hardware, KernelSpeed
from ringattn.cost.layer import BACKWARD, AttentionShape, group_bytes, kv_heads_of, state_bytes
from ringattn.planning.schedules import Move, Step
from ringattn.planning.slices import Bands

if TYPE_CHECKING:
    from ringattn.planning.plan import Plan


@dataclass(frozen=True)
class Event:
    """``kind``: compute, exchange (of K/V or heads), gradients or wait; seconds from the start of
    the pass ``of``, forward or backward."""

    rank: int
    of: str
    kind: str
    label: str
    begin: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """Estimated seconds of one layer: ``forward`` and ``backward`` of the slowest rank, and the
    kernel's part of both (``compute``), which is what remains if every exchange is hidden."""

    forward: float
    backward: float
    compute: float
    spans: tuple[Event, ...] = ()

    @property
    def seconds(self) -> float:
        return self.forward + self.backward

    @property
    def exposed(self) -> float:
        """Seconds that exchanges, and waiting for slower ranks, add to the kernel's."""
        return max(0.0, self.seconds - self.compute)


def sample(plan: Plan) -> list[int]:
    """The ranks that usually say how long a plan takes: those at the ends of the sequence and of
    the work."""
    areas = plan.partition.pairs_per_rank
    groups = {0, len(areas) - 1, int(areas.argmax()), int(areas.argmin())}
    return sorted(group * plan.ulysses for group in groups)


def simulate(
    plan: Plan,
    shape: AttentionShape,
    hardware: Hardware,
    precision: str = "bf16",
    node_size: int | None = None,
    ranks: Sequence[int] | None = None,
    spans: bool = False,
    together: int | None = None,
) -> Timeline:
    """The layer on ``hardware``, whose nodes hold ``node_size`` neighbouring ranks.

    ``ranks``: those that are followed, by default all; the others are taken to keep their pace.
    ``together``: ranks that are at work on the same cores, by default those of the plan on a node;
    where there are fewer ``cores``, all of a node slow down alike.
    """
    ranks = list(range(plan.world)) if ranks is None else list(ranks)
    if node_size is None or hardware.alone:
        node_size = hardware.node(plan.world)
    together = min(node_size, plan.world) if together is None else together
    walk = _Walk(plan, shape, hardware, precision, node_size, ranks, spans, together)
    forward, backward = walk.forward(), walk.backward()
    compute = float((walk.kernels[0] + walk.kernels[1]).max())
    return Timeline(forward, backward, compute, tuple(walk.spans))


def kernel_seconds(
    bands: Bands, flops: float, peak: float, kernel: KernelSpeed, dims: int = 256
) -> float:
    """Of one call over ``bands``; ``flops`` of a pair in this pass; ``dims``: head_dim of k and v
    together."""
    if not bands:
        return 0.0
    if "cost" not in bands.derived:
        bands.derived["cost"] = _sizes(bands)
    area, left, right, width = bands.derived["cost"]
    both = (left > 0) & (right > 0)
    one = np.maximum(left, right)
    cut = kernel.edge(np.minimum(one, width)) * (left + right)
    if kernel.band is not None:
        cut = np.where(both, kernel.band(np.minimum(width, one)) * (left + right), cut)
    flops *= 1 + kernel.softmax / dims
    rate = peak * kernel.efficiency(block_size(area, width))
    return float((flops * (area + cut) / rate).sum())


def block_size(area: Any, side: Any) -> Any:
    """The side of the square block that is as efficient as one of ``area`` pairs whose shorter
    side is ``side``: between that and the root of the area."""
    return np.sqrt(side * np.sqrt(area))


def state_traffic(bands: Bands, query: float, key: float) -> float:
    """Bytes that a call reads and writes of running states, ``query`` a row of q and ``key`` a row
    of the block: a kernel that is one of several cannot keep them on the chip."""
    if not bands:
        return 0.0
    rows, keys = max(b.q.stop for b in bands), max(b.k.stop for b in bands)
    return query * min(rows, sum(len(b.q) for b in bands)) + key * min(
        keys, sum(len(b.k) for b in bands)
    )


def _tokens(moves: Sequence[Move]) -> int:
    return sum(m.tokens for m in moves)


def _sizes(bands: Bands) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Per band: pairs, rows that its lower and its upper side cut, its width."""
    q, k, lo, hi, area = np.array(
        [(len(b.q), len(b.k), b.lo, b.hi, b.area) for b in bands], float
    ).T
    # Row i is cut on the left if i + lo > 0, on the right if i + hi < k - 1.
    first, last = np.maximum(0, -hi), np.minimum(q, k - lo)  # rows with a key
    left = np.clip(last - np.maximum(first, 1 - lo), 0, None) * (lo > 1 - q)
    right = np.clip(np.minimum(last, k - 1 - hi) - first, 0, None) * (hi < k - 1)
    return area, left, right, np.minimum(np.minimum(hi - lo + 1, q), k)


class _Walk:
    """The two passes over the steps of ``ranks`` together; arrays are ``[ranks]``."""

    def __init__(
        self,
        plan: Plan,
        shape: AttentionShape,
        hardware: Hardware,
        precision: str,
        node_size: int,
        ranks: list[int],
        spans: bool,
        together: int,
    ) -> None:
        self.plan, self.shape, self.hardware, self.ranks = plan, shape, hardware, ranks
        self.node_size, self.wanted, self.spans = node_size, spans, []
        self.at = {rank: place for place, rank in enumerate(ranks)}
        _, self.nodes = np.unique([rank // node_size for rank in ranks], return_inverse=True)
        self.near = hardware.link(False)
        # Nodes may be said to be smaller than the machine: its link is then the same throughout.
        one = hardware.inter_node is None and plan.world <= hardware.node_size
        self.far = self.near if one or plan.world <= node_size else hardware.link(True)
        steps = [plan.steps(rank) for rank in ranks]
        self.steps: list[tuple[Step, ...]] = list(zip(*steps, strict=True))
        peak = hardware.flops(precision)
        pair = shape.pair_flops() / plan.ulysses
        early = [Bands(row[0].bands.halves[0] if len(row) > 1 else row[0].bands) for row in steps]
        late = [row[0].bands.halves[1] if len(row) > 1 else Bands(()) for row in steps]

        several = len(self.steps) > 1
        # Read and written once per step: out forward; dq, dk and dv backward.
        unit = 2 * state_bytes(shape) * shape.batch * several
        out = unit * shape.values * shape.heads / plan.ulysses
        dq = unit * shape.head_dim * shape.heads / plan.ulysses
        # Every rank has as many K/V heads in its ring.
        kv_heads = kv_heads_of(plan.heads(ranks[0]), shape)
        self.row = shape.batch * shape.dims * kv_heads  # elements of a K/V row
        dk = unit * shape.dims * kv_heads

        def times(
            all_bands: Sequence[Bands], factor: float, kernel: KernelSpeed, query: float, key: float
        ) -> np.ndarray:
            return np.array(
                [
                    kernel_seconds(b, pair * factor, peak, kernel, shape.dims)
                    + state_traffic(b, query, key) / hardware.memory_bandwidth
                    for b in all_bands
                ]
            )

        self.on_forward = [
            times([s.bands for s in row], 1, hardware.forward, out, 0) for row in self.steps
        ]
        parts = [early, *([s.bands for s in row] for row in self.steps[1:]), late]
        self.on_backward = [times(bands, BACKWARD, hardware.backward, dq, dk) for bands in parts]
        self.kernels = sum(self.on_forward), sum(self.on_backward)
        # Beyond their turns, ranks that share cores are slower, and wait for one to exchange.
        crowded = hardware.cores is not None and together > hardware.cores
        self.together = together
        self.oversubscription, self.switch = (
            (hardware.oversubscription, hardware.switch) if crowded else (0.0, 0.0)
        )
        self.busy = np.zeros(1)  # seconds of each node's cores in this pass

    def _exchange(
        self,
        moves_of: Callable[[Step], tuple[Move, ...]],
        back_of: Callable[[Step], tuple[Move, ...]],
        index: int,
        width: int,
        kernel: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
        """Of the exchange of step ``index``, per rank: seconds, those that a kernel beside it feels
        among them, and places of the peers that are followed."""
        rows, row = [], self.steps[index]
        unit = width * self.row
        for rank, step in zip(self.ranks, row, strict=True):
            comes, goes = moves_of(step), back_of(step)
            far, away = self._remote(rank, comes), self._remote(rank, goes)
            near_bytes = max(_tokens(comes) - _tokens(far), _tokens(goes) - _tokens(away))
            far_bytes = max(_tokens(far), _tokens(away))
            remote = max(len(far), len(away))
            near = max(len(comes) - len(far), len(goes) - len(away))
            rows.append((near_bytes * unit, 2 * near, far_bytes * unit, 2 * remote))
        near_bytes, near, far_bytes, remote = np.array(rows, float).T
        inside = self.near.seconds(near_bytes, near)
        across = self.far.seconds(far_bytes, remote)
        if self.far.node < float("inf"):
            shared = self.far.shared(unit * self._crossing(index, moves_of, back_of))
            across = np.where(remote > 0, np.maximum(across, shared), across)
        seconds = np.maximum(inside, across)
        # Latency is waiting: a kernel does not feel it.
        felt = sum(
            (1 - link.overlap_efficiency) * np.maximum(0.0, part - link.latency)
            for link, part in ((self.near, inside), (self.far, across))
        )
        peers = [
            [self.at[m.peer] for m in (*moves_of(step), *back_of(step)) if m.peer in self.at]
            for step in row
        ]
        # Who waits for a core does so until a kernel ends at the latest.
        waits = min(self.switch, float(kernel.max()))
        return np.where(seconds > 0, seconds + waits, 0.0), felt, peers

    def _remote(self, rank: int, moves: Sequence[Move]) -> list[Move]:
        """Those to or from other nodes."""
        return [m for m in moves if m.peer // self.node_size != rank // self.node_size]

    def _crossing(
        self,
        index: int,
        moves_of: Callable[[Step], tuple[Move, ...]],
        back_of: Callable[[Step], tuple[Move, ...]],
    ) -> np.ndarray:
        """Rows that all ranks of each followed rank's node exchange with other nodes in a step, in
        the direction with more; of a direction that one rank has to itself, none."""
        found: dict[int, int] = {}
        for rank in self.ranks:
            node = rank // self.node_size
            if node in found:
                continue
            ways: tuple[list[int], list[int]] = ([], [])
            first = node * self.node_size
            for other in range(first, min(first + self.node_size, self.plan.world)):
                step = self.plan.steps(other)[index]
                for way, of in zip(ways, (moves_of, back_of), strict=True):
                    way.append(_tokens(self._remote(other, of(step))))
            found[node] = max(sum(way) if sum(map(bool, way)) > 1 else 0 for way in ways)
        return np.array([found[rank // self.node_size] for rank in self.ranks], float)

    def _compute(self, start: np.ndarray, kernel: np.ndarray, felt: np.ndarray) -> np.ndarray:
        """When a kernel that begins at ``start`` ends, ``felt`` seconds of exchange in it."""
        busy = kernel * (1 + self.oversubscription) + felt
        if self.hardware.cores is None:
            return start + busy
        load = np.bincount(self.nodes, busy) * self.together / np.bincount(self.nodes)
        self.busy = self.busy + load
        most = np.zeros(len(load))
        np.maximum.at(most, self.nodes, busy)
        slower = np.maximum(1.0, load / np.maximum(self.hardware.cores * most, 1e-30))
        return start + busy * slower[self.nodes]

    def _arrive(
        self, begun: np.ndarray, free: np.ndarray, seconds: np.ndarray, peers: list[list[int]]
    ) -> np.ndarray:
        """When an exchange is complete that waits for both ends and for the link."""
        ready = [max(begun[[place, *others]]) for place, others in enumerate(peers)]
        return np.where(seconds > 0, np.maximum(ready, free) + seconds, begun)

    def forward(self) -> float:
        into, back = self._heads("forward")
        now = np.full(len(self.ranks), into)
        free = now.copy()
        for index in range(len(self.steps)):
            moving, felt, peers = self._exchange(
                lambda s: s.recvs, lambda s: s.sends, index, self.shape.itemsize,
                self.on_forward[index],
            )  # fmt: skip
            done = self._compute(now, self.on_forward[index], felt)
            arrived = self._arrive(now, free, moving, peers)
            self._note("forward", "compute", f"step {index}", now, done)
            self._note("forward", "exchange", f"K/V, step {index}", arrived - moving, arrived)
            free = np.maximum(free, arrived)
            self._note("forward", "wait", f"step {index}", done, np.maximum(done, arrived))
            now = np.maximum(done, arrived)
        self._note("forward", "exchange", "heads of out", now, now + back)
        return max(float(now.max()), self._least()) + back

    def backward(self) -> float:
        into, back = self._heads("backward")
        now = np.full(len(self.ranks), into)
        free, home = now.copy(), now.copy()
        home_felt = np.zeros(len(self.ranks))  # of gradients on their way
        for index in range(len(self.steps)):
            moving, felt, peers = self._exchange(
                lambda s: s.recvs, lambda s: s.sends, index, self.shape.itemsize,
                self.on_backward[index],
            )  # fmt: skip
            arrived = self._arrive(now, free, moving, peers)
            free = np.maximum(free, arrived)
            done = self._compute(now, self.on_backward[index], felt + home_felt)
            self._note("backward", "compute", f"step {index}", now, done)
            self._note("backward", "exchange", f"K/V, step {index}", arrived - moving, arrived)
            ready = np.maximum(done, home)
            grads, home_felt, peers = self._exchange(
                lambda s: s.grad_recvs, lambda s: s.grad_sends, index, state_bytes(self.shape),
                self.on_backward[index],
            )  # fmt: skip
            home = self._arrive(ready, free, grads, peers)
            free = np.maximum(free, home)
            self._note("backward", "gradients", f"dK/dV, step {index}", home - grads, home)
            self._note("backward", "wait", f"step {index}", done, np.maximum(ready, arrived))
            now = np.maximum(ready, arrived)
        done = self._compute(now, self.on_backward[-1], home_felt)
        self._note("backward", "compute", "rest of step 0", now, done)
        end = np.maximum(done, home)
        self._note("backward", "wait", "gradients", done, end)
        self._note("backward", "exchange", "heads of dq, dk, dv", end, end + back)
        return max(float(end.max()), self._least()) + back

    def _least(self) -> float:
        """Seconds that a node's cores need for the pass, however ranks take turns; forgets them."""
        least = float(self.busy.max()) / self.hardware.cores if self.hardware.cores else 0.0
        self.busy = np.zeros(1)
        return least

    def _heads(self, name: str) -> tuple[float, float]:
        """Seconds of the all-to-all over heads before and after, which nothing hides."""
        split = self.plan.heads(self.ranks[0])
        if split is None:
            return 0.0, 0.0
        crosses = len({member // self.node_size for member in split.members}) > 1
        link = self.far if crosses else self.near
        into, back = (getattr(b, name) for b in group_bytes(split, self.shape))
        others = split.degree - 1
        together = min(self.node_size, self.plan.world) if crosses else 1
        before, after = (float(link.seconds(size, 3 * others, together)) for size in (into, back))
        self._note(name, "exchange", "heads", np.zeros(len(self.ranks)), before)
        return before, after

    def _note(self, of: str, kind: str, label: str, begin, end) -> None:
        if not self.wanted:
            return
        begin, end = (np.broadcast_to(x, (len(self.ranks),)) for x in (begin, end))
        self.spans += [
            Event(rank, of, kind, label, float(a), float(b))
            for rank, a, b in zip(self.ranks, begin, end, strict=True)
            if b > a
        ]
