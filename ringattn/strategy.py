"""How any mask is split: a layout and a schedule by name. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ringattn.cost import Hardware
from ringattn.make import make_plan, make_segments
from ringattn.planning import layouts
from ringattn.planning import masks as planning_masks
from ringattn.planning.layer_plans import LayerPlans
from ringattn.planning.layouts import Layout
from ringattn.planning.masks import Mask
from ringattn.planning.plan import Plan
from ringattn.planning.segments import Segments


@dataclass(frozen=True)
class Strategy:
    """How to split any mask over ``cp`` ranks: a layout by name, and what
    :func:`ringattn.make_plan` takes."""

    cp: int
    layout: str = "zigzag"
    schedule: str = "ring"
    # Schedule and ulysses by kind of layer, where they have been chosen.
    by_kind: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    ulysses: int | None = None
    node_size: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int = 128
    hardware: Hardware | None = None

    def plan(self, mask: Mask) -> Plan:
        """The plan of ``mask``; the same on every rank."""
        layout = layouts.build(self.layout, mask, self.cp)
        return self._plan(mask, layout, self.schedule, self.ulysses)

    def _plan(self, mask: Mask, layout: Layout, schedule: str, ulysses: int | None) -> Plan:
        return make_plan(
            mask,
            layout,
            schedule,
            ulysses,
            node_size=self.node_size,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            hardware=self.hardware,
        )

    def plans(
        self,
        masks: Mapping[str, Mask],
        layers: Sequence[str],
        states: Mapping[str, Sequence[int]] | None = None,
    ) -> LayerPlans:
        """The plans of a model whose ``layers`` are of these kinds (NONE: without attention), on
        one layout: balanced for the sum over the layers. "auto" chooses for each kind. ``states``:
        of kinds that carry a state, the lengths of the documents.

        Raises ValueError for states and a striped layout."""
        states = states or {}
        layout = layout_of(self.layout, masks, layers, states, self.cp)
        usual = (self.schedule, self.ulysses)
        plans = {
            kind: self._plan(mask, layout, *self.by_kind.get(kind, usual))
            for kind, mask in masks.items()
        }
        return LayerPlans(plans, layers, segments=segments_of(states, layout))

    def like(self, plans: LayerPlans) -> Strategy:
        """This strategy with what "auto" chose for ``plans``, so that it is chosen once."""
        by_kind = {kind: (plan.schedule, plan.ulysses) for kind, plan in plans.items()}
        if not by_kind:
            return self
        one = plans.heaviest
        return replace(self, schedule=one.schedule, by_kind=by_kind, ulysses=one.ulysses)


def layout_of(
    name: str,
    masks: Mapping[str, Mask],
    layers: Sequence[str],
    states: Mapping[str, Sequence[int]],
    cp: int,
) -> Layout:
    """Of the attention of all layers together; where none attends, every token is as much work."""
    each = [masks[kind] for kind in layers if kind in masks]
    if not each:
        each = [planning_masks.sliding_window(sum(next(iter(states.values()))), 1)]
    return layouts.build(name, each, cp)


def segments_of(states: Mapping[str, Sequence[int]], layout: Layout) -> dict[str, Segments]:
    """Of kinds of layer that carry a state, over documents of these lengths."""
    return {
        kind: make_segments(planning_masks.documents(lengths), layout)
        for kind, lengths in states.items()
    }
