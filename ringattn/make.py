"""Makes plans: arguments are checked, and "auto" is chosen by what plans cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from ringattn import cost
from ringattn.cost import AttentionShape, Hardware, presets
from ringattn.planning import head_split, masks, plan, schedules
from ringattn.planning.blocks import Blocks
from ringattn.planning.layer_plans import LayerPlans
from ringattn.planning.layouts import Layout
from ringattn.planning.masks import Mask
from ringattn.planning.plan import Plan
from ringattn.planning.runs import integer
from ringattn.planning.segments import Segments

_FEW = 8  # ranks of which "auto" follows each
_TIE = 0.01  # estimates closer than that say nothing


def make_plan(
    mask: Mask,
    layout: Layout,
    schedule: str = "ring",
    ulysses: int | None = None,
    *,
    key_layout: Layout | None = None,
    node_size: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int = 128,
    v_dim: int | None = None,
    itemsize: int = 2,
    hardware: Hardware | None = None,
    **unsupported: Any,
) -> Plan:
    """Plan ``mask`` on ``layout``. The same arguments give the same plan object, which is kept.

    Args:
        layout: who owns which queries; ``key_layout``: who owns which keys, by default the same.
        schedule: one of :data:`ringattn.planning.schedules.BUILDERS`, or "auto" for the cheapest by
            :mod:`ringattn.cost`; then ``plan.reason`` says why.
        ulysses: over how many neighbouring ranks heads are split; 1 unless given. "auto"
            chooses it too where it is not given and ``heads`` are.
        node_size: neighbouring ranks with a fast link: what ``double_ring`` and "auto" must know of
            the machine; the others are the same on any.
        heads, kv_heads: of the model; checked here instead of at the first call if given.
        head_dim, v_dim, itemsize: what "auto" counts with besides (``itemsize`` bytes an element).
        hardware: what "auto" counts on; None: an H100's description.

    Raises ValueError when mask, layouts, schedule, ulysses and node size do not fit, and for any
    ``unsupported`` argument, which no schedule honours: nothing is ever dropped in silence.
    """
    if unsupported:
        raise ValueError(
            f"{', '.join(sorted(unsupported))}: not supported by any schedule; what limits who "
            "attends whom (a window, packed documents) belongs into the mask; dropout and biases "
            "do not exist here"
        )
    if schedule not in (*schedules.BUILDERS, "auto"):
        legal = ", ".join((*schedules.BUILDERS, "auto"))
        raise ValueError(f"schedule={schedule!r} is not available; choose one of: {legal}")
    for name, value in (("mask", mask), ("layout", layout), ("key_layout", key_layout)):
        kind = Mask if name == "mask" else Layout
        if not isinstance(value, kind) and (name != "key_layout" or value is not None):
            raise ValueError(f"{name} must be a {kind.__name__} of ringattn, got {value!r}")
    key_layout = layout if key_layout is None else key_layout
    _check_layouts(mask, layout, key_layout)
    world = layout.world
    for name, count in (("ulysses", ulysses), ("node_size", node_size)):
        if count is not None and world % integer(name, count, 1):
            legal = ", ".join(str(d) for d in range(1, world + 1) if world % d == 0)
            raise ValueError(
                f"{name}={count} does not divide the {world} ranks; choose one of: {legal}"
            )
    if heads is None and kv_heads is not None:
        raise ValueError(f"kv_heads={kv_heads} needs heads= beside it")
    if heads is not None:
        kv_heads = heads if kv_heads is None else kv_heads
        head_split.check_heads(integer("heads", heads, 1), integer("kv_heads", kv_heads, 1))
        head_split.check_degree(ulysses or 1, world, heads)
    integer("head_dim", head_dim, 1)
    if schedule == "double_ring" and node_size is None:
        raise ValueError("schedule='double_ring' needs node_size=, the ranks of one node")
    if node_size and ulysses and node_size % ulysses and ulysses % node_size:
        raise ValueError(f"node_size={node_size} and ulysses={ulysses}: one must divide the other")
    if schedule == "auto":
        # Without heads only degree 1 is known to be legal.
        degrees = (
            (ulysses or 1,)
            if heads is None or ulysses
            else tuple(
                u
                for u in head_split.legal_degrees(world, heads)
                if not node_size or node_size % u == 0
            )
        )
        shape = AttentionShape(heads or 1, kv_heads or 1, head_dim, v_dim, itemsize)
        hardware = hardware or presets.usual()
        return _cheapest(mask, layout, key_layout, node_size, shape, degrees, hardware)
    return _plan(mask, layout, key_layout, schedule, ulysses or 1, node_size or world)


def make_plans(masks: Mapping[str, Mask], layout: Layout, **as_make_plan: Any) -> LayerPlans:
    """One plan for each kind of layer, by name, all on one layout: {kind: plan} of {kind: mask}.

    ``as_make_plan``: arguments as of :func:`make_plan`; a schedule of "auto" is chosen for each. A
    layout for them: ``layouts.balanced([masks[kind] for kind in layers], world)`` balances the sum
    over layers.

    >>> masks = {"local": ringattn.masks.sliding_window(n, 512), "global": ringattn.masks.causal(n)}
    >>> plans = ringattn.make_plans(masks, ringattn.layouts.zigzag(n, 8))

    Raises ValueError as make_plan does, with the kind; and if there is no mask.
    """
    if not isinstance(masks, Mapping) or not masks:
        raise ValueError(f"make_plans needs {{kind: mask}}, got {masks!r}")
    plans = {}
    for kind, mask in masks.items():
        try:
            plans[kind] = make_plan(mask, layout, **as_make_plan)
        except ValueError as error:
            raise ValueError(f"{kind}: {error}") from None
    return LayerPlans(plans)


@lru_cache(maxsize=32)
def _cheapest(
    mask: Mask,
    layout: Layout,
    key_layout: Layout,
    node_size: int | None,
    shape: AttentionShape,
    degrees: tuple[int, ...],
    hardware: Hardware,
) -> Plan:
    """The plan with the least estimated time, of a few ranks. Every rank of a world chooses the
    same."""
    world, precision = layout.world, "bf16" if shape.itemsize <= 2 else "fp32"
    names = [name for name in schedules.BUILDERS if name != "double_ring" or node_size]
    estimates: list[tuple[float, str, int]] = []
    for ulysses in degrees:
        for name in names:
            plan = _plan(mask, layout, key_layout, name, ulysses, node_size or world)
            ranks = range(world) if world <= _FEW else cost.sample(plan)
            line = cost.simulate(plan, shape, hardware, precision, plan.node_size, ranks)
            estimates.append((line.seconds, name, ulysses))
    least = min(estimates)[0]
    near = [each for each in estimates if each[0] <= least * (1 + _TIE)]
    # Of equals the lowest degree: what is exchanged over heads is kept in memory too.
    best, name, ulysses = min(near, key=lambda each: (each[2], names.index(each[1])))
    others = sorted(each for each in estimates if each[1:] != (name, ulysses))
    reason = f"auto: estimated {best * 1e3:.4g} ms per layer"
    if others:
        reason += ", against " + ", ".join(
            f"{time * 1e3:.4g} ({other}, ulysses {u})" for time, other, u in others[:4]
        )
    if len(near) > 1:
        reason += f"; of {len(near)} within 1 % the lowest degree"
    plan = _plan(mask, layout, key_layout, name, ulysses, node_size or world)
    return replace(plan, reason=reason)


@lru_cache(maxsize=32)
def _plan(
    mask: Mask, layout: Layout, key_layout: Layout, schedule: str, ulysses: int, node_size: int
) -> Plan:
    return Plan(mask, layout, key_layout, schedule, ulysses, node_size)


def forget() -> None:
    """Empties the caches of plans: for benchmarks, and to free memory."""
    for cached in (_plan, plan._partition, _cheapest):
        cached.cache_clear()


def _check_layouts(mask: Mask, layout: Layout, key_layout: Layout) -> None:
    if mask.n_q != layout.n:
        raise ValueError(f"the mask has {mask.n_q} queries, the layout has {layout.n} tokens")
    if mask.n_k != key_layout.n:
        hint = "" if key_layout is not layout else "; give the keys a layout with key_layout="
        raise ValueError(
            f"the mask has {mask.n_k} keys, their layout has {key_layout.n} tokens{hint}"
        )
    if layout.world != key_layout.world:
        raise ValueError(
            f"queries are laid out over {layout.world} ranks, keys over {key_layout.world}"
        )
    # A layout of single tokens goes with any step.
    single = any(all(len(run) < 2 for run, _ in x.owned) for x in (layout, key_layout))
    if layout.step != key_layout.step and not single:
        raise ValueError(
            f"queries and keys need layouts with one step, got {layout.step} and {key_layout.step}"
        )


@lru_cache(maxsize=64)
def make_segments(mask: Mask, layout: Layout, way: str | None = None) -> Segments:
    """What mixers with a state along the sequence go by, for packed documents or one text:
    ``mask`` is ``masks.causal(n)`` or ``masks.documents(lengths)``. ``way``: how states are
    exchanged, "direct", "doubling", "contiguous direct" or "contiguous doubling"; None: for each
    layer what weighs least. The same arguments give the same object.

    Raises ValueError for another mask, since a state sees all tokens of a document before it; for
    a layout whose runs are not contiguous; and for an unknown way.
    """
    why = "a state sees all tokens of its document before it"
    lengths = _lengths("make_segments", mask, layout, why)
    return Segments(layout, lengths, way)


@lru_cache(maxsize=64)
def make_blocks(
    mask: Mask, layout: Layout, size: int, stride: int | None = None, ulysses: int = 1
) -> Blocks:
    """What mixers that summarise or choose blocks go by: blocks of ``size`` tokens, one every
    ``stride`` (None: side by side), which begin anew in each document; ``mask`` is
    ``masks.causal(n)`` or ``masks.documents(lengths)``. ``ulysses``: over how many neighbouring
    ranks heads are split. The same arguments give the same object.

    Raises ValueError for another mask, a layout whose runs are not contiguous, and degrees that do
    not divide the ranks.
    """
    why = "what limits who attends whom besides is the mixer's"
    lengths = _lengths("make_blocks", mask, layout, why)
    if layout.world % integer("ulysses", ulysses, 1):
        raise ValueError(f"ulysses={ulysses} does not divide the {layout.world} ranks")
    return Blocks(layout, lengths, size, stride, ulysses)


def _lengths(name: str, mask: Mask, layout: Layout, why: str) -> list[int]:
    """Of the documents that a mask is of. Raises ValueError for any other mask."""
    lengths = mask.pieces
    documents = masks.documents(lengths)
    if mask.n_q != layout.n or mask.area != documents.area or (mask - documents).area:
        raise ValueError(
            f"{name}: the mask must be causal(n) or documents(lengths) of the layout's {layout.n} "
            f"tokens: {why}"
        )
    return lengths
