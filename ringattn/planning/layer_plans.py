"""The plans of a whole model: one for each kind of layer, all on one layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ringattn.planning.blocks import Blocks
from ringattn.planning.layouts import Layout
from ringattn.planning.masks import Mask
from ringattn.planning.plan import Plan
from ringattn.planning.segments import Segments

ONE = "all"  # the kind of every layer, where there is one
NONE = ""  # of layers without attention


@dataclass(frozen=True)
class SetPlans:
    """Of layers that attend several ``sets`` of keys (a ringattn.models.key_sets.KeySets): the
    ``blocks`` that they go by, and a plan for each set by its name.

    What costs read besides: ``scored``, products with summaries for each query; ``gathered``,
    summaries that every rank receives of all others; ``relaid``, how often queries are laid out
    again, by what they chose; ``moved``, how often all tokens move to another order and back;
    ``features`` of linear attention beside the sets.
    """

    sets: Any
    blocks: Blocks
    plans: Mapping[str, Plan]
    scored: int = 0
    gathered: int = 0
    relaid: int = 0
    moved: int = 0
    features: int = 0


class LayerPlans(dict[str, Plan]):
    """{kind: plan}; ``layers`` are the kinds of the model's layers, in order (by default each kind
    once; NONE for those without attention), and ``shared`` the mask that they all share, where it
    is known. ``segments``: of kinds of layer that carry a state, and have no plan. ``sets``: of
    kinds of layer with several sets of keys, whose plans are here too, as "kind: set", with the
    key layouts of their summaries.

    Raises ValueError for plans of several layouts, or layers of which there is no plan.
    """

    def __init__(
        self,
        plans: Mapping[str, Plan],
        layers: Sequence[str] | None = None,
        shared: Mask | None = None,
        segments: Mapping[str, Segments] | None = None,
        sets: Mapping[str, SetPlans] | None = None,
    ) -> None:
        super().__init__(plans)
        self.segments, self.sets = dict(segments or {}), dict(sets or {})
        kinds = [*self, *self.segments, *self.sets]
        self.layers = tuple(kinds if layers is None else layers)
        self.shared = shared
        if unknown := set(self.layers) - {*kinds, NONE}:
            raise ValueError(f"layers of kind {', '.join(sorted(unknown))} have no plan")
        for kind, plan in self.items():
            for name, layout in (("layout", plan.layout), ("key layout", plan.key_layout)):
                if layout is not self.layout and layout != self.layout:
                    raise ValueError(f"the {name} of {kind} is not that of the first plan")
        for kind, several in self.sets.items():
            if several.blocks.layout is not self.layout and several.blocks.layout != self.layout:
                raise ValueError(f"the blocks of {kind} have another layout than the first plan")
        # After that check: summaries have layouts of their own.
        self.of_set = {
            f"{kind}: {name}": kind for kind, own in self.sets.items() for name in own.plans
        }
        self.update(
            (f"{kind}: {name}", plan)
            for kind, own in self.sets.items()
            for name, plan in own.plans.items()
        )
        for kind, states in self.segments.items():
            if states.layout is not self.layout and states.layout != self.layout:
                raise ValueError(f"the segments of {kind} have another layout than the first plan")

    @classmethod
    def alike(cls, plan: Plan, layers: int) -> LayerPlans:
        """One plan for all layers."""
        return cls({ONE: plan}, [ONE] * layers)

    @property
    def first(self) -> Plan:
        """The plan of the first kind."""
        return next(iter(self.values()))

    @property
    def layout(self) -> Layout:
        """The one layout of all kinds."""
        if self:
            return self.first.layout
        each = [segments.layout for segments in self.segments.values()]
        return [*each, *(own.blocks.layout for own in self.sets.values())][0]

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.layout.world

    @property
    def heaviest(self) -> Plan | None:
        """Of the kind whose layers have most pairs in all; None where none attends."""
        return max(self.values(), key=lambda plan: plan.mask.area, default=None)

    @property
    def degree(self) -> int:
        """Ranks that the heads of the heaviest are split over."""
        return heaviest.ulysses if (heaviest := self.heaviest) else 1

    @property
    def counts(self) -> Counter[str]:
        """Layers of each kind that attends; of one with several sets of keys, of each set."""
        layers = Counter(self.layers)
        return Counter({kind: count for kind in self
                        if (count := layers[self.of_set.get(kind, kind)])})  # fmt: skip

    @property
    def of_sets(self) -> Counter[str]:
        """Layers of each kind that attends sets of keys."""
        return Counter(kind for kind in self.layers if kind in self.sets)

    @property
    def states(self) -> Counter[str]:
        """Layers of each kind that carries a state."""
        return Counter(kind for kind in self.layers if kind in self.segments)

    @property
    def pairs(self) -> int:
        """Attended pairs, summed over the layers."""
        return sum(count * self[kind].mask.area for kind, count in self.counts.items())

    @property
    def area(self) -> float:
        """Attended pairs of a layer, on the mean; an integer where all are alike."""
        whole, rest = divmod(self.pairs, len(self.layers))
        return whole + rest / len(self.layers) if rest else whole

    @property
    def imbalance(self) -> float:
        """Largest work of a rank over the mean, summed over the layers; 1.0 is perfect."""
        work = [
            sum(count * self[kind].area(rank) for kind, count in self.counts.items())
            for rank in range(self.world)
        ]
        return max(work) * self.world / sum(work) if any(work) else 1.0

    @property
    def schedule(self) -> str:
        """The schedule, or those of the kinds."""
        return _said({kind: plan.schedule for kind, plan in self.items()})

    @property
    def ulysses(self) -> str:
        """The degree, or those of the kinds."""
        return _said({kind: str(plan.ulysses) for kind, plan in self.items()})

    @property
    def reason(self) -> str:
        """Why an automatic choice fell as it did."""
        reasons = {kind: plan.reason for kind, plan in self.items() if plan.reason}
        return _said(reasons) if reasons else ""


def _said(each: Mapping[str, str]) -> str:
    one = set(each.values())
    if not one:
        return "none"
    if len(one) == 1:
        return one.pop()
    return ", ".join(f"{kind} {value}" for kind, value in each.items())
