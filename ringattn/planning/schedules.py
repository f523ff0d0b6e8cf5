"""Schedules: how K/V rows reach the ranks that attend them, and how their gradients go home.

A schedule is a function from a partition and a rank to plain data, which the executor walks without
knowing the schedule. A new schedule is a new function here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ringattn.planning.partition import Partition, coalesced, pack
from ringattn.planning.runs import Run
from ringattn.planning.slices import Band, Bands


@dataclass(frozen=True)
class Move:
    """Rows of K/V (or of their gradients) to or from the group rank ``peer``.

    ``rows`` are rows of the block number ``block`` of this rank, in the order in which they travel.
    """

    peer: int
    block: int
    rows: tuple[Run, ...]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))

    def __str__(self) -> str:
        rows = ", ".join(map(str, self.rows))
        return f"rows {rows} of block {self.block}"


@dataclass(frozen=True)
class Step:
    """Compute ``bands`` (local queries x rows of block number ``block``) while moves travel.

    ``sends``/``recvs`` run while this step computes and are complete before the next one begins.
    ``grad_sends``/``grad_recvs`` are the backward's: they begin after this step has computed and
    run while the next one does; then what arrived is added to the gradient of its block.
    """

    block: int
    bands: Bands
    sends: tuple[Move, ...] = ()
    recvs: tuple[Move, ...] = ()
    grad_sends: tuple[Move, ...] = ()
    grad_recvs: tuple[Move, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.bands, Bands):
            object.__setattr__(self, "bands", Bands(self.bands))


@dataclass(frozen=True)
class RankPlan:
    """The steps of one rank. ``blocks`` are the tokens of each block; block 0 is its own K/V."""

    blocks: tuple[int, ...]
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        """What the rank does, step by step, for a person."""
        lines = [f"{len(self.steps)} steps; rows of its blocks: {', '.join(map(str, self.blocks))}"]
        for index, step in enumerate(self.steps):
            lines.append(f"step {index}, on block {step.block}")
            lines += [f"  computes {band}" for band in step.bands] or ["  computes nothing"]
            for word, toward, moves in (
                ("sends", "to", step.sends),
                ("receives", "from", step.recvs),
                ("backward, then sends gradients of", "to", step.grad_sends),
                ("backward, then receives gradients of", "from", step.grad_recvs),
            ):
                lines += [f"  {word} {move} {toward} rank {move.peer}" for move in moves]
        return "\n".join(lines)

    def blocks_done(self, index: int) -> list[int]:
        """The blocks that no step after ``index`` computes on, sends or receives."""
        return self._blocks_done.get(index, [])

    def grads_done(self, index: int) -> list[int]:
        """The blocks whose gradient is complete and on its way once ``index`` has begun its
        exchange; never block 0."""
        return self._grads_done.get(index, [])

    @cached_property
    def _blocks_done(self) -> dict[int, list[int]]:
        return self._last(lambda step: (step.sends, step.recvs))

    @cached_property
    def _grads_done(self) -> dict[int, list[int]]:
        return self._last(lambda step: (step.grad_sends, step.grad_recvs))

    def _last(self, moves: Callable[[Step], tuple[tuple[Move, ...], ...]]) -> dict[int, list[int]]:
        last = {}
        for index, step in enumerate(self.steps):
            for block in (step.block, *(move.block for some in moves(step) for move in some)):
                last[block] = index
        done: dict[int, list[int]] = {}
        for block, index in last.items():
            if block:
                done.setdefault(index, []).append(block)
        return done

    def with_peers(self, peer: Callable[[int], int]) -> RankPlan:
        """The same, every peer renamed."""

        def renamed(moves: Sequence[Move]) -> tuple[Move, ...]:
            return tuple(replace(move, peer=peer(move.peer)) for move in moves)

        steps = (
            replace(
                step,
                sends=renamed(step.sends),
                recvs=renamed(step.recvs),
                grad_sends=renamed(step.grad_sends),
                grad_recvs=renamed(step.grad_recvs),
            )
            for step in self.steps
        )
        return RankPlan(self.blocks, tuple(steps))


def ring(partition: Partition, rank: int, node_size: int) -> RankPlan:
    """Blocks travel from rank to rank + 1 (Liu et al. 2023, "Ring Attention").

    A block stops at the last rank that attends it. Its gradient begins at the first rank that does,
    collects along the way one step behind, and goes home in one message.
    """
    return double_ring(partition, rank, partition.world)


def double_ring(partition: Partition, rank: int, node_size: int) -> RankPlan:
    """Rings of ``node_size`` ranks inside of rings of nodes (Gu et al. 2024, "LoongTrain").

    In cycle j a node works on the blocks of the node j places before it: they pass once around
    inside, while every rank hands the block it began with to its counterpart in the next node, a
    part per step. Gradients collect inside each node and go home from there.
    """
    size, nodes = node_size, partition.world // node_size
    node, place = divmod(rank, size)
    path = _paths(partition, size)
    count = partition.k_layout.count
    blocks, number = [], {}

    def owner(cycle: int, hop: int) -> int:
        return (node - cycle) % nodes * size + (place - hop) % size

    for cycle in range(nodes):
        for hop in range(size):
            if hop <= path.last[owner(cycle, hop), cycle]:
                number[cycle, hop] = len(blocks)
                blocks.append(count(owner(cycle, hop)))
    bands = _bands(partition, rank)
    after, before = node * size + (place + 1) % size, node * size + (place - 1) % size
    next_node, last_node = (rank + size) % partition.world, (rank - size) % partition.world
    steps = []
    for index in range(path.steps):
        cycle, hop = divmod(index, size)
        mine, coming = owner(cycle, hop), owner(cycle, hop + 1)
        here = number.get((cycle, hop), 0)
        sends, recvs, grad_sends, grad_recvs = [], [], [], []
        if hop < path.last[mine, cycle]:
            sends.append(Move(after, here, _whole(count(mine))))
        if hop + 1 < size and hop < path.last[coming, cycle]:
            recvs.append(Move(before, number[cycle, hop + 1], _whole(count(coming))))
        if cycle + 1 < nodes:
            for theirs, peer, at, moves in (
                (owner(cycle, 0), next_node, cycle, sends),
                (owner(cycle + 1, 0), last_node, cycle + 1, recvs),
            ):
                if path.last[theirs, cycle + 1] >= 0 and (rows := _share(count(theirs), hop, size)):
                    moves.append(Move(peer, number[at, 0], rows))
        # A block's gradient exists between the first and the last rank of the node that attend it.
        first, final = path.first[mine, cycle], path.final[mine, cycle]
        if first <= hop <= final:
            peer = after if hop < final else mine
            grad_sends.append(Move(peer, here, _whole(count(mine))))
        if hop + 1 < size and path.first[coming, cycle] <= hop < path.final[coming, cycle]:
            grad_recvs.append(Move(before, number[cycle, hop + 1], _whole(count(coming))))
        if path.first[rank, cycle] <= hop == path.final[rank, cycle]:
            peer = (node + cycle) % nodes * size + (place + hop) % size
            grad_recvs.append(Move(peer, 0, _whole(count(rank))))
        work = coalesced(bands(mine, _whole(count(mine)))) if (cycle, hop) in number else ()
        moves = (tuple(some) for some in (sends, recvs, grad_sends, grad_recvs))
        steps.append(Step(here, work, *moves))
    return RankPlan(tuple(blocks), tuple(steps))


@dataclass(frozen=True)
class _Paths:
    """How far blocks and gradients go, per owner and cycle ``[world, nodes]``, in hops.

    ``last``: of the block (-1: it does not enter that node). ``first``/``final``: of its gradient,
    between the first and the last rank that attend it; final is -1 where none does, and the own
    rank's share needs no travel.
    """

    last: np.ndarray
    first: np.ndarray
    final: np.ndarray
    steps: int


def _paths(partition: Partition, size: int) -> _Paths:
    return partition.remember(("paths", size), lambda: _work_out_paths(partition, size))


def _work_out_paths(partition: Partition, size: int) -> _Paths:
    nodes = partition.world // size
    node, place = np.divmod(np.arange(partition.world)[:, None, None], size)
    cycle, hop = np.arange(nodes)[None, :, None], np.arange(size)[None, None, :]
    ranks = (node + cycle) % nodes * size + (place + hop) % size
    owner = np.arange(partition.world)[:, None, None]
    attends = partition.rows_needed[ranks, owner] > 0  # [owner, cycle, hop]
    attends[:, 0, 0] = False  # the owner itself
    some = attends.any(2)
    first = np.where(some, attends.argmax(2), size)
    final = np.where(some, size - 1 - attends[:, :, ::-1].argmax(2), -1)
    # A block passes through every node up to the last that attends it.
    enters = np.maximum.accumulate(some[:, ::-1], axis=1)[:, ::-1]
    enters[:, 0] = True
    last = np.where(enters, np.maximum(final, 0), -1)
    reached = np.where(last >= 0, np.arange(nodes) * size + last, 0)
    return _Paths(last, first, final, int(reached.max()) + 1)


def all_gather(partition: Partition, rank: int, node_size: int) -> RankPlan:
    """Each rank receives, in one exchange, the whole K/V of every owner that it attends."""
    stages = [range(1, partition.world)] if partition.world > 1 else []
    return _gathered(
        partition, rank, stages, lambda _, owner: _whole(partition.k_layout.count(owner))
    )


def direct(partition: Partition, rank: int, node_size: int) -> RankPlan:
    """Each rank receives from each owner exactly the rows that it attends, in stages.

    A stage holds the owners at neighbouring distances, as many as keep its rows within a quarter
    of all that any rank receives (so compute hides them) and within the size of a block (so
    buffers are no larger than a ring's). Distances at which nobody attends take none.
    """
    stages = partition.remember(
        "stages", lambda: stages_of(partition.rows_needed, partition.k_layout.n)
    )
    return _gathered(partition, rank, stages, partition.rows)


def stages_of(rows_needed: np.ndarray, n: int) -> list[list[int]]:
    """The distances of each stage of ``direct``, of keys ``[reader, owner]`` out of n."""
    world = len(rows_needed)
    ranks = np.arange(world)[:, None]
    distances = np.arange(1, world)
    # What a rank receives in the forward, and what comes back to it in the backward.
    read = rows_needed[ranks, (ranks - distances) % world]  # [rank, distance]
    rows = np.concatenate([read, rows_needed[(ranks + distances) % world, ranks]])
    quarter = -(-int(rows.sum(1).max(initial=0)) // 4)
    limit = min(quarter, -(-n // world))
    stages, rows_so_far = [], np.zeros(len(rows), np.int64)
    for distance in distances.tolist():
        more = rows[:, distance - 1]
        if not more.any():
            continue
        if not stages or (rows_so_far + more).max() > limit:
            stages.append([])
            rows_so_far = np.zeros(len(rows), np.int64)
        stages[-1].append(distance)
        rows_so_far = rows_so_far + more
    return stages


def _gathered(
    partition: Partition,
    rank: int,
    stages: Sequence[Sequence[int]],
    rows_of: Callable[[int, int], tuple[Run, ...]],
) -> RankPlan:
    """Owner and reader exchange directly: one block per stage, which holds the rows of the owners
    at that stage's distances one after the other."""
    world, bands = partition.world, _bands(partition, rank)
    blocks = [partition.k_layout.count(rank)]
    own = coalesced(bands(rank, _whole(blocks[0])))
    work, incoming, outgoing = [own], [], []
    for stage in stages:
        filled, sends, recvs, computes = 0, [], [], []
        for distance in stage:
            reader, owner = (rank + distance) % world, (rank - distance) % world
            if partition.rows_needed[reader, rank] and (rows := rows_of(reader, rank)):
                sends.append(Move(reader, 0, rows))
            if partition.rows_needed[rank, owner] and (rows := rows_of(rank, owner)):
                computes += bands(owner, rows, filled)
                stop = filled + sum(map(len, rows))
                recvs.append(Move(owner, len(blocks), (Run(filled, stop),)))
                filled = stop
        blocks.append(filled)
        work.append(coalesced(computes))
        outgoing.append(tuple(sends))
        incoming.append(tuple(recvs))
    # Gradients take the same ways back: what came in goes out, into the rows it was read from.
    steps = tuple(
        Step(
            block=index,
            bands=work[index],
            sends=outgoing[index] if index < len(stages) else (),
            recvs=incoming[index] if index < len(stages) else (),
            grad_sends=incoming[index - 1] if index else (),
            grad_recvs=outgoing[index - 1] if index else (),
        )
        for index in range(len(stages) + 1)
    )
    return RankPlan(tuple(blocks), steps)


def _bands(partition: Partition, rank: int) -> Callable[..., list[Band]]:
    """(owner, its rows in the buffer, offset) -> the work of ``rank`` on them."""
    blocks = partition.blocks(rank)

    def bands(owner: int, rows: tuple[Run, ...], offset: int = 0) -> list[Band]:
        return pack(blocks.get(owner, ()), rows, offset)

    return bands


def _whole(count: int) -> tuple[Run, ...]:
    return (Run(0, count),) if count else ()


def _share(count: int, part: int, parts: int) -> tuple[Run, ...]:
    run = Run(count * part // parts, count * (part + 1) // parts)
    return (run,) if run else ()


BUILDERS = {"ring": ring, "double_ring": double_ring, "all_gather": all_gather, "direct": direct}
