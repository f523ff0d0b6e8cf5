"""How any mask is split: a layout and a schedule by name. NumPy only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from ringattn.cost import Hardware
from ringattn.make import make_plan, make_segments
from ringattn.planning import layouts
from ringattn.planning import masks as planning_masks
from ringattn.planning.layer_plans import LayerPlans, SetPlans
from ringattn.planning.layouts import Layout
from ringattn.planning.masks import Mask
from ringattn.planning.plan import Plan
from ringattn.planning.segments import Segments


class Sets(Protocol):
    """A kind of layer that attends sets of keys: :class:`ringattn.models.key_sets.KeySets`."""

    @property
    def smallest(self) -> Sets: ...

    def degree(self, ulysses: int, kv_heads: int) -> int: ...

    def plans(self, layout: Layout, lengths: Sequence[int], ulysses: int = 1) -> SetPlans: ...


@dataclass(frozen=True)
class Strategy:
    """How to split any mask over ``cp`` ranks: a ``layout`` by name, and the ``schedule``,
    ``ulysses``, ``node_size``, ``heads``, ``kv_heads``, ``head_dim`` and ``hardware`` of
    :func:`ringattn.make_plan`. ``by_kind``: schedule and ulysses by kind of layer, where they have
    been chosen; ``sets``: of kinds that attend sets of keys."""

    cp: int
    layout: str = "zigzag"
    schedule: str = "ring"
    by_kind: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    ulysses: int | None = None
    node_size: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int = 128
    hardware: Hardware | None = None
    sets: Mapping[str, Sets] = field(default_factory=dict)

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
        """The plans, by ``masks`` of kinds, of a model whose ``layers`` are of these kinds (NONE:
        without attention), on
        one layout: balanced for the sum over the layers. "auto" chooses for each kind. ``states``:
        of kinds that carry a state or attend sets of keys, the lengths of the documents.

        Raises ValueError for states and a striped layout."""
        states = states or {}
        layout = layout_of(self.layout, masks, layers, states, self.cp, self.sets)
        usual = (self.schedule, self.ulysses)
        plans = {
            kind: self._plan(mask, layout, *self.by_kind.get(kind, usual))
            for kind, mask in masks.items()
        }
        segments, sets = carried(states, layout, self.sets, self._degree, self.kv_heads)
        return LayerPlans(plans, layers, segments=segments, sets=sets)

    def _degree(self, kind: str) -> int:
        """Ranks that heads are split over in layers that attend sets of keys, where they may be."""
        return self.by_kind.get(kind, ("", self.ulysses))[1] or 1

    def like(self, plans: LayerPlans) -> Strategy:
        """This strategy with what "auto" chose for ``plans``, so that it is chosen once."""
        own = {kind: plan for kind, plan in plans.items() if kind not in plans.of_set}
        by_kind = {kind: (plan.schedule, plan.ulysses) for kind, plan in own.items()}
        by_kind |= {kind: ("direct", sets.blocks.ulysses) for kind, sets in plans.sets.items()}
        if not own:
            return replace(self, by_kind=by_kind)
        one = max(own.values(), key=lambda plan: plan.mask.area)
        return replace(self, schedule=one.schedule, by_kind=by_kind, ulysses=one.ulysses)


def layout_of(
    name: str,
    masks: Mapping[str, Mask],
    layers: Sequence[str],
    states: Mapping[str, Sequence[int]],
    cp: int,
    sets: Mapping[str, Sets] | None = None,
) -> Layout:
    """Of the attention of all layers together; where none attends, every token is as much work."""
    each = [masks[kind] for kind in layers if kind in masks]
    if name == "balanced":
        known = sets or {}
        for kind in (kind for kind in layers if kind in known and kind in states):
            one = layouts.contiguous(sum(states[kind]), 1)
            each += [plan.mask for plan in known[kind].plans(one, states[kind]).plans.values()]
    if not each:
        each = [planning_masks.sliding_window(sum(next(iter(states.values()))), 1)]
    return layouts.build(name, each, cp)


def segments_of(states: Mapping[str, Sequence[int]], layout: Layout) -> dict[str, Segments]:
    """Of kinds of layer that carry a state, over documents of these lengths."""
    return {
        kind: make_segments(planning_masks.documents(lengths), layout)
        for kind, lengths in states.items()
    }


def carried(
    states: Mapping[str, Sequence[int]],
    layout: Layout,
    sets: Mapping[str, Sets],
    ulysses: Callable[[str], int],
    kv_heads: int | None,
) -> tuple[dict[str, Segments], dict[str, SetPlans]]:
    """What the kinds of layer in ``states`` go by, over documents of these lengths: (segments of
    those that carry a state, plans of those that attend ``sets`` of keys). ``ulysses``: ranks that
    a kind's heads are split over, where they may be."""
    of_states = {kind: lengths for kind, lengths in states.items() if kind not in sets}
    of_sets = {
        kind: sets[kind].plans(layout, lengths, sets[kind].degree(ulysses(kind), kv_heads or 1))
        for kind, lengths in states.items()
        if kind in sets
    }
    return segments_of(of_states, layout), of_sets
