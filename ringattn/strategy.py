"""How any mask is split: a layout and a schedule by name. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ringattn.cost import Hardware
from ringattn.make import make_plan
from ringattn.planning import layouts
from ringattn.planning.masks import Mask
from ringattn.planning.plan import Plan


@dataclass(frozen=True)
class Strategy:
    """How to split any mask over ``cp`` ranks: a layout by name, and what
    :func:`ringattn.make_plan` takes."""

    cp: int
    layout: str = "zigzag"
    schedule: str = "ring"
    ulysses: int | None = None
    node_size: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int = 128
    hardware: Hardware | None = None

    def plan(self, mask: Mask) -> Plan:
        """The plan of ``mask``; the same on every rank."""
        return make_plan(
            mask,
            layouts.build(self.layout, mask, self.cp),
            self.schedule,
            self.ulysses,
            node_size=self.node_size,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            hardware=self.hardware,
        )

    def like(self, plan: Plan) -> Strategy:
        """This strategy with what "auto" chose for ``plan``, so that it is chosen once."""
        return replace(self, schedule=plan.schedule, ulysses=plan.ulysses)
