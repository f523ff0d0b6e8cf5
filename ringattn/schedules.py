"""Schedules: the order in which K/V blocks reach a rank, and the way their gradients go home.

A schedule is a function from (plan, rank) to steps. The executor walks any such list, so a new
schedule is a new function here and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ringattn.masks import Slice

if TYPE_CHECKING:
    from ringattn.plan import Plan


@dataclass(frozen=True)
class Move:
    """``tokens`` K/V rows (or rows of their gradients) to or from the group rank ``peer``.

    A gradient that arrives with ``home`` belongs to this rank's own keys; otherwise it is added
    to the gradient of the block that the next step holds.
    """

    peer: int
    tokens: int
    home: bool = False


@dataclass(frozen=True)
class Step:
    """One step: compute ``slices`` (local queries x rows of the held block) while moves travel.

    ``sends``/``recvs`` pass the held block on and bring the block of the next step; they run
    while this step computes. ``grad_sends``/``grad_recvs`` pass on this step's finished gradient;
    they run while the next step computes.
    """

    owner: int
    tokens: int
    slices: tuple[Slice, ...]
    sends: tuple[Move, ...] = ()
    recvs: tuple[Move, ...] = ()
    grad_sends: tuple[Move, ...] = ()
    grad_recvs: tuple[Move, ...] = ()


def ring(plan: Plan, rank: int) -> tuple[Step, ...]:
    """Blocks travel from rank to rank + 1 (Liu et al. 2023, "Ring Attention").

    A block stops at the last rank that attends it; its gradient collects there on the way and
    goes home in one message. Gradients cover the same path as the blocks, one step behind.
    """
    world, count, reach = plan.layout.world, plan.layout.count, plan.reach
    after, before = (rank + 1) % world, (rank - 1) % world
    steps = []
    for hop in range(world):
        owner, incoming = (rank - hop) % world, (rank - hop - 1) % world
        held = hop <= reach[owner]
        onward = hop < reach[owner]
        arriving = hop < reach[incoming]
        grad_sends, grad_recvs = [], []
        if hop and held:
            grad_sends = [Move(after if onward else owner, count(owner), home=not onward)]
        if hop and arriving:
            grad_recvs = [Move(before, count(incoming))]
        if hop and hop == reach[rank]:
            grad_recvs.append(Move((rank + hop) % world, count(rank), home=True))
        steps.append(
            Step(
                owner=owner,
                tokens=count(owner) if held else 0,
                slices=plan.block(rank, owner) if held else (),
                sends=(Move(after, count(owner)),) if onward else (),
                recvs=(Move(before, count(incoming)),) if arriving else (),
                grad_sends=tuple(grad_sends),
                grad_recvs=tuple(grad_recvs),
            )
        )
    while len(steps) > 1 and steps[-1] == Step(steps[-1].owner, 0, ()):
        steps.pop()
    return tuple(steps)


BUILDERS = {"ring": ring}
