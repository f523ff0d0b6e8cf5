"""What a rank holds while it walks its steps, in rows."""

from __future__ import annotations

from dataclasses import dataclass

from ringattn.planning.schedules import Move, RankPlan


@dataclass(frozen=True)
class Buffers:
    """Largest number of rows that blocks hold at a time beyond the rank's own K/V.

    ``kv``: rows of K/V. ``grads``: rows of float32 gradients of blocks that are not its own, and
    of gradients on their way. Copies of a part of a block for the time of a message (where its rows
    are not dense in memory) and what a kernel needs inside are not counted.
    """

    kv: int
    grads: int


def buffers(plan: RankPlan) -> Buffers:
    """The peaks of the executor's walk through the steps."""
    kv_alive, grads_alive, kv_peak, grads_peak = {0}, {0}, 0, 0
    arriving = flying = 0

    def rows(alive: set[int]) -> int:
        return sum(plan.blocks[block] for block in alive if block)

    for index, step in enumerate(plan.steps):
        kv_alive |= {move.block for move in step.recvs}
        kv_peak = max(kv_peak, rows(kv_alive))
        kv_alive -= set(plan.blocks_done(index))
        # The gradient of this step's block is made while the last exchange is still under way.
        if step.bands or step.grad_sends:
            grads_alive.add(step.block)
        grads_alive |= {move.block for move in step.grad_recvs}
        grads_peak = max(grads_peak, rows(grads_alive) + arriving + flying)
        arriving, flying = _rows(step.grad_recvs), _rows(step.grad_sends)
        grads_peak = max(grads_peak, rows(grads_alive) + arriving)
        grads_alive -= set(plan.grads_done(index))
    return Buffers(kv_peak, max(grads_peak, arriving + flying))


def _rows(moves: tuple[Move, ...]) -> int:
    return sum(move.tokens for move in moves)
