"""Plans: a mask cut by layouts, for a schedule, as plain data that any executor can walk.

Per rank a list of steps; per step what is computed (bands of local rows), what is sent to whom,
and what arrives. Work, bytes, memory and balance are read off the same object.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

from ringattn.planning import head_split, schedules
from ringattn.planning.head_split import HeadSplit
from ringattn.planning.layouts import Layout
from ringattn.planning.masks import Mask
from ringattn.planning.partition import Partition
from ringattn.planning.schedules import RankPlan, Step

_NUMBERS = count()
_PLANS: WeakValueDictionary[int, Plan] = WeakValueDictionary()


def numbered(number: int) -> Plan:
    """The plan with this number; RuntimeError if nobody has kept it."""
    plan = _PLANS.get(number)
    if plan is None:
        raise RuntimeError(
            f"plan number {number} is gone; keep the plan until the backward pass has run"
        )
    return plan


@dataclass(frozen=True, eq=False)
class Plan:
    """What every rank computes and exchanges for one mask on one layout.

    Make it with :func:`ringattn.make_plan`, once per batch; all layers share it. ``layout`` says
    who owns the queries, ``key_layout`` who owns the keys. ``schedule``, ``ulysses`` and
    ``node_size`` are as chosen; ``reason`` says why an automatic choice fell as it did; ``number``
    stands for the plan where only an integer may.
    """

    mask: Mask
    layout: Layout
    key_layout: Layout
    schedule: str
    ulysses: int
    node_size: int
    reason: str = ""
    _ranks: dict[int, RankPlan] = field(default_factory=dict, repr=False)
    number: int = field(default_factory=_NUMBERS.__next__, init=False, repr=False)

    def __post_init__(self) -> None:
        _PLANS[self.number] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or a plan from another process, is a plan of its own."""
        self.__dict__.update(state, number=next(_NUMBERS))
        _PLANS[self.number] = self

    def __str__(self) -> str:
        text = (
            f"{self.schedule} over {self.world} ranks, ulysses {self.ulysses}, layout "
            f"{self.layout.name}, {self.mask.n_q} x {self.mask.n_k} tokens, {self.mask.area} pairs"
        )
        return f"{text} ({self.reason})" if self.reason else text

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.layout.world

    @cached_property
    def partition(self) -> Partition:
        """The mask cut by groups of ``ulysses`` ranks, which the schedule sees as one rank each."""
        return _partition(self.mask, self.layout, self.key_layout, self.ulysses)

    @cached_property
    def of_groups(self) -> Plan:
        """The same over the groups of ``ulysses`` ranks, each as if it were one rank."""
        layout, key_layout = self.partition.q_layout, self.partition.k_layout
        node = max(1, self.node_size // self.ulysses)
        return Plan(self.mask, layout, key_layout, self.schedule, 1, node)

    def rank(self, rank: int) -> RankPlan:
        """The blocks and steps of ``rank``; worked out on first use and kept."""
        if rank not in self._ranks:
            group, member = divmod(rank, self.ulysses)
            inside = max(1, self.node_size // self.ulysses)
            own = schedules.BUILDERS[self.schedule](self.partition, group, inside)
            if self.ulysses > 1:
                own = own.with_peers(lambda peer: peer * self.ulysses + member)
            self._ranks[rank] = own
        return self._ranks[rank]

    def steps(self, rank: int) -> tuple[Step, ...]:
        """The steps of ``rank``."""
        return self.rank(rank).steps

    def heads(self, rank: int) -> HeadSplit | None:
        """How the heads of ``rank`` are split within its group; None without ulysses."""
        if self.ulysses == 1:
            return None
        return head_split.split(rank, self.ulysses, self.layout, self.key_layout)

    def area(self, rank: int) -> int:
        """Number of (query, key) pairs that ``rank`` computes, of all heads: with ulysses u a group
        of u ranks shares its pairs, each for a part of the heads."""
        group, member = divmod(rank, self.ulysses)
        share, rest = divmod(int(self.partition.pairs_per_rank[group]), self.ulysses)
        return share + (member < rest)

    def recv_tokens(self, rank: int) -> int:
        """Number of K/V rows that ``rank`` receives in one forward pass, rows of a part of the
        heads included; :mod:`ringattn.cost` has the bytes."""
        rows = sum(move.tokens for step in self.steps(rank) for move in step.recvs)
        if split := self.heads(rank):
            rows += sum(self.key_layout.count(r) for r in split.members if r != rank)
        return rows

    def grad_recv_tokens(self, rank: int) -> int:
        """Number of dK/dV rows (float32) that ``rank`` receives in one backward pass, without
        those of the ulysses group."""
        return sum(move.tokens for step in self.steps(rank) for move in step.grad_recvs)

    @cached_property
    def imbalance(self) -> float:
        """Largest area of a rank over the mean area; 1.0 is perfect, and so is no work at all."""
        areas = self.partition.pairs_per_rank
        return float(areas.max() / areas.mean()) if areas.any() else 1.0


@lru_cache(maxsize=32)
def _partition(mask: Mask, layout: Layout, key_layout: Layout, ulysses: int) -> Partition:
    if ulysses > 1:
        join = layout.step == key_layout.step == 1  # both in the same way
        layout, key_layout = (x.merged(ulysses, join) for x in (layout, key_layout))
    return Partition(mask, layout, key_layout)
