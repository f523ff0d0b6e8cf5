"""Kinds of layer of a transformers model: which masks its config asks for, and one plan for each.

A mask is never written down twice: transformers' own functions of the config say who attends whom,
and a window or a chunk is read off them. What the layers of the model itself then ask for is
compared with the plans before the first forward.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig, masking_utils

from ringattn.hf.attention import NAME, ActiveSplit, Allowed, Layer, LayerMask
from ringattn.hf.batch import lengths_of, masks_of
from ringattn.hf.coverage import NotCovered, language_model, probed
from ringattn.hf.mixers import has_mixers
from ringattn.make import make_plans as plans_of
from ringattn.planning import layouts, masks
from ringattn.planning.layer_plans import LayerPlans
from ringattn.planning.layouts import Layout
from ringattn.planning.masks import Mask
from ringattn.planning.plan import Plan
from ringattn.planning.runs import Run
from ringattn.planning.segments import Segments
from ringattn.planning.slices import Slice

FULL, WINDOW, CHUNK = "full_attention", "sliding_attention", "chunked_attention"
_CAUSAL = {
    FULL: "create_causal_mask",
    WINDOW: "create_sliding_window_causal_mask",
    CHUNK: "create_chunked_causal_mask",
}
_NO_MIXERS = ("mlp", "moe")  # layers, of models that count them so, in which tokens do not meet
_PROBED: WeakKeyDictionary[nn.Module, dict[nn.Module, Layer]] = WeakKeyDictionary()
_ROWS = 24  # of a mask, that are compared in a proof


def make_plans(
    model: nn.Module,
    mask: Mask,
    layout: Layout | str,
    *,
    world: int | None = None,
    **as_make_plan: Any,
) -> LayerPlans:
    """A plan for each kind of layer of ``model``, as its config names them ("full_attention",
    "sliding_attention", "chunked_attention"), all on one layout.

    Args:
        model: a transformers model made with ``attn_implementation="ringattn"``.
        mask: what all layers share: ``masks.causal(n)``, ``masks.documents(lengths)``, for an
            encoder ``masks.full(n)`` or ``masks.documents(lengths, causal=False)``, or one of your
            own; each kind has the pairs that this and the layer's own mask both have. Chunks and
            windows count from the start of each document.
        layout: who owns which tokens; or the name of one (``layouts.NAMES``) with ``world=``, and
            "balanced" is then balanced for the sum over all layers.
        as_make_plan: as :func:`ringattn.make_plan` takes it, for every kind; ``schedule`` and
            ``ulysses`` may be mappings of kinds.

    Raises ValueError where a layer's mask is none of these, where the mask has pairs that no layer
    has, or has one direction only and the model both.
    """
    config = text_config(model)
    causal = is_causal(model)
    if has_mixers(model):
        layer_types = _attending(model, config)
    else:
        layer_types = [kind for kind in covered_types(model, config) if kind in _CAUSAL]
    lengths = mask.pieces
    functions = {} if causal else _of_layers(model, config)
    own = {
        kind: _own_mask(config, kind, functions.get(kind) or _of_config(config, kind), lengths)
        for kind in dict.fromkeys(layer_types)
    }
    looks_back = all(part.hi <= 0 for part in mask.slices)
    looks_back = looks_back or (mask & masks.causal(mask.n_q)).area == mask.area
    if causal and not looks_back:
        raise ValueError(
            f"{type(model).__name__} is causal, and the mask has queries that attend later keys; "
            "a plan cannot make a layer see more than it does"
        )
    if not causal and looks_back and mask.area > mask.n_q:
        raise ValueError(
            f"{type(model).__name__} attends both ways, and the mask is causal; give "
            "masks.full(n) or masks.documents(lengths, causal=False)"
        )
    # Of packed documents a layer has all that is its own: nothing to intersect.
    plain = mask == masks.documents(lengths, causal)
    each = {kind: own[kind] if plain else mask & own[kind] for kind in own}
    if isinstance(layout, str):
        if world is None:
            raise ValueError(f"layout={layout!r}: give world= too, the ranks that share a sequence")
        layout = layouts.build(layout, [each[kind] for kind in layer_types], world)
    by_kind = [name for name, x in as_make_plan.items() if isinstance(x, Mapping)]
    made: dict[str, Plan] = {}
    for kind, own_mask in each.items():
        own_arguments = as_make_plan | {name: as_make_plan[name][kind] for name in by_kind}
        made |= plans_of({kind: own_mask}, layout, **own_arguments)
    plans = LayerPlans(made, layer_types, mask)
    check_segments(model, plans)
    return plans


def check_segments(model: nn.Module, plans: Plan | Mapping[Any, Plan]) -> None:
    """Raises ValueError where ``model`` has layers with a state along the sequence, and the plans'
    layout has no segments, or what all layers share is no packed documents: a state sees all tokens
    of its document before it."""
    if not has_mixers(model):
        return
    known = masks_of(plans)
    lengths = lengths_of(plans)
    shared = getattr(plans, "shared", None)
    looks_back = all((mask & masks.causal(mask.n_q)).area == mask.area for mask in known)
    if not looks_back or (shared is not None and shared != masks.documents(lengths)):
        raise ValueError(
            f"{type(model).__name__} has layers with a state along the sequence, which see all "
            "tokens of their document before them: the mask must be masks.causal(n) or "
            "masks.documents(lengths)"
        )
    layout = (plans if isinstance(plans, Plan) else next(iter(plans.values()))).layout
    Segments(layout, lengths)


def text_config(model: nn.Module) -> PretrainedConfig:
    """The config of the language model inside. Raises NotCovered where there is none, ValueError
    where it was made with another attention."""
    config = language_model(model).config.get_text_config()
    if config._attn_implementation != NAME:
        raise ValueError(
            f"{type(model).__name__} was made with "
            f"attn_implementation={config._attn_implementation!r}; "
            f'make it with attn_implementation="{NAME}"'
        )
    return config


def types_of(config: PretrainedConfig) -> Sequence[str]:
    """The type of each layer, as transformers names them."""
    for name in ("layer_types", "layers_block_type"):
        if getattr(config, name, None):
            return list(getattr(config, name))
    if getattr(config, "sliding_window", None) is not None:
        kind = WINDOW
    elif getattr(config, "attention_chunk_size", None) is not None:
        kind = CHUNK
    else:
        kind = FULL
    return [kind] * config.num_hidden_layers


def covered_types(model: nn.Module, config: PretrainedConfig) -> Sequence[str]:
    """:func:`types_of`. Raises NotCovered for layers that neither attend by a mask nor leave tokens
    alone."""
    types = types_of(config)
    if has_mixers(model):  # what a layer does with its tokens is then found by the probe
        return types
    if unknown := sorted({*types} - {*_CAUSAL, *_NO_MIXERS}):
        raise NotCovered(
            f"{type(model).__name__} has layers of type {', '.join(unknown)}, which mix tokens "
            "without softmax attention, or by a mask of their own: they are not covered"
        )
    return types


def _attending(model: nn.Module, config: PretrainedConfig) -> list[str]:
    """The types of the layers that attend, of a model that has others too. Where none attends there
    is one kind all the same, which says what all layers share."""
    layers, types = _layers_of(model), types_of(config)
    found = [types[layer.index] for layer in layers.values() if layer.index is not None]
    return [kind if kind in _CAUSAL else FULL for kind in found] or [FULL]


def _layers_of(model: nn.Module) -> dict[nn.Module, Layer]:
    """The layers of a model that attend. It is probed once: plans are made for every batch."""
    inside = language_model(model)
    if inside not in _PROBED:
        _PROBED[inside] = probed(inside, torch.zeros(1, 1, dtype=torch.long))
    return _PROBED[inside]


def is_causal(model: nn.Module) -> bool:
    """Whether attention looks back only, as its modules say."""
    says = [m.is_causal for m in model.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    return any(says) or not says


def _of_layers(model: nn.Module, config: PretrainedConfig) -> dict[str, Allowed]:
    """The mask functions of the layers, by type, as they hand them to their attention. Of models
    that attend both ways: of their windows there are two conventions."""
    layers, types = _layers_of(model), types_of(config)
    return {
        types[layer.index]: layer.allowed for layer in layers.values() if layer.index is not None
    }


def _of_config(config: PretrainedConfig, kind: str) -> Allowed:
    """The mask function that transformers makes for a causal layer of this type."""
    return _function(getattr(masking_utils, _CAUSAL[kind]), config)


def _own_mask(
    config: PretrainedConfig, kind: str, allowed: Allowed, lengths: Sequence[int]
) -> Mask:
    """What a layer of this type attends in documents of these lengths."""
    if kind == CHUNK:
        chunk = config.attention_chunk_size
        own = masks.side_by_side([masks.block_local(n, chunk) for n in lengths])
    else:
        lo, hi = read_band(allowed, max(lengths, default=0))
        runs = (part.q for part in masks.documents(lengths).slices)
        n = sum(lengths)
        own = Mask(tuple(Slice.make(run, run, lo, hi) for run in runs), n, n)
    if differences(own, allowed, lengths, None):
        raise ValueError(f"layers of type {kind}: their mask is neither a window nor a chunk")
    return own


def pairs_of(model: nn.Module, n: int) -> Callable[[int], int]:
    """Attended pairs of a document, summed over the layers, as a function of its length, at most
    ``n``."""
    config, causal = text_config(model), is_causal(model)
    types = _attending(model, config) if has_mixers(model) else covered_types(model, config)
    functions = {} if causal else _of_layers(model, config)
    layers = Counter(kind for kind in types if kind in _CAUSAL)
    if has_mixers(model) and not _layers_of(model):
        layers.clear()
    bands = {
        kind: read_band(functions.get(kind) or _of_config(config, kind), n)
        for kind in layers
        if kind != CHUNK
    }

    @lru_cache(4096)
    def pairs(length: int) -> int:
        run = Run(0, length)
        total = 0
        for kind, count in layers.items():
            if kind == CHUNK:
                own = masks.block_local(length, config.attention_chunk_size)
            else:
                own = Mask((Slice.make(run, run, *bands[kind]),), length, length)
            total += count * own.area
        return total

    return pairs


def own_band(config: PretrainedConfig, kind: str, n: int) -> tuple[int | None, int | None]:
    """:func:`read_band` of a causal layer type in a text of ``n`` tokens."""
    return read_band(_of_config(config, kind), n)


def _function(create: Any, config: PretrainedConfig) -> Allowed:
    """The mask function that transformers makes of a config. Its parameters have changed their
    names over the versions."""
    known = {"config": config, "attention_mask": None, "cache_position": torch.arange(2)}
    known |= dict.fromkeys(("inputs_embeds", "input_embeds"), torch.empty(1, 2, 1))
    parameters = inspect.signature(create).parameters
    arguments = {
        name: known.get(name)
        for name, p in parameters.items()
        if name in known or (p.default is p.empty and p.kind is not p.VAR_KEYWORD)
    }
    result = create(**arguments)
    if not isinstance(result, LayerMask):
        raise ValueError(f"transformers' {create.__name__} gives no function of a mask")
    return result


def read_band(allowed: Allowed, n: int) -> tuple[int | None, int | None]:
    """The least and the largest ``key - query`` that a layer allows in ``n`` tokens, as its first
    and its last query show; None where it allows all."""
    every = torch.arange(n)
    first = allowed(torch.zeros_like(every), every).nonzero()
    last = allowed(torch.full_like(every, n - 1), every).nonzero()
    if not len(first) or not len(last):
        return None, None
    lo, hi = int(last.min()) - (n - 1), int(first.max())
    return (None if lo == 1 - n else lo), (None if hi == n - 1 else hi)


class _Rows:
    """The slices of a mask, to be asked by query."""

    def __init__(self, mask: Mask) -> None:
        self.slices = mask.slices
        columns = ((part.q.start, part.q.stop, part.q.step) for part in mask.slices)
        self.start, self.stop, self.step = np.array([*columns], np.int64).reshape(-1, 3).T

    def at(self, q: int) -> list[Slice]:
        inside = (self.start <= q) & (q < self.stop) & ((q - self.start) % self.step == 0)
        return [self.slices[i] for i in np.flatnonzero(inside)]


def _has(parts: Sequence[Slice], q: int, keys: np.ndarray) -> np.ndarray:
    """bool for each key: whether query ``q``, whose slices these are, attends it."""
    seen = np.zeros(len(keys), bool)
    for part in parts:
        run, apart = part.k, keys - q
        on = (keys >= run.start) & (keys < run.stop) & ((keys - run.start) % run.step == 0)
        seen |= on & (apart >= part.lo) & (apart <= part.hi)
    return seen


Pairs = list[tuple[int, int]]


def differences(
    mask: Mask, allowed: Allowed, lengths: Sequence[int], shared: Mask | None
) -> tuple[Pairs, Pairs] | None:
    """Pairs (query, key) that ``mask`` has and the layer, by its function, has not, and the other
    way round; None if there are none. The layer counts positions in documents of ``lengths``, which
    do not see each other; with ``shared``, of its pairs only those count.

    Compared are some rows, on both sides of every edge that the mask or a document has there, and
    at all distances: two rows of one run of keys each that agree there are equal.
    """
    n = mask.n_q
    generator = np.random.default_rng(0)
    rows = {0, 1, n // 2, n - 2, n - 1, *generator.integers(0, max(n, 1), _ROWS).tolist()}
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ours, others = _Rows(mask), shared and _Rows(shared)
    wide, narrow = [], []
    for q in sorted(row for row in rows if 0 <= row < n):
        at = int(np.searchsorted(starts, q, side="right")) - 1
        begin, end = int(starts[at]), int(starts[at + 1])
        edges = {begin, end, q, *generator.integers(begin, end, 8).tolist()}
        edges |= {q + sign * 2**i for i in range(n.bit_length()) for sign in (-1, 1)}
        parts = ours.at(q)
        for part in parts:
            edges |= {part.k.start, part.k.last, q + part.lo, q + part.hi}
        near = {edge + by for edge in edges for by in (-1, 0, 1)}
        keys = np.array(sorted(key for key in near if 0 <= key < n), np.int64)
        inside = torch.from_numpy(keys - begin)
        want = allowed(torch.full_like(inside, q - begin), inside).numpy()
        want = want & (keys >= begin) & (keys < end)
        if others:
            want &= _has(others.at(q), q, keys)
        have = _has(parts, q, keys)
        wide += [(q, int(key)) for key in keys[have & ~want]]
        narrow += [(q, int(key)) for key in keys[want & ~have]]
    return (wide, narrow) if wide or narrow else None


def assign(
    split: ActiveSplit, layers: Mapping[nn.Module, Layer], config: PretrainedConfig
) -> dict[nn.Module, Plan]:
    """The plan of each attention layer: that of its type, or where plans have other names the one
    whose mask is the layer's own. Raises ValueError for a plan that is wider or narrower than
    it."""
    shared, types = getattr(split.plans, "shared", None), types_of(config)
    cache: dict[tuple[int, int], Any] = {}
    assigned: dict[nn.Module, Plan] = {}

    def compare(plan: Plan, layer: Layer, kind: str | None) -> Any:
        key = plan.number, id(layer.allowed)
        if key not in cache:
            cache[key] = differences(plan.mask, layer.allowed, split.lengths, shared)
            if cache[key] is None and shared is None:  # a plan of the user's: to the last pair
                own = _own_mask(config, kind or FULL, layer.allowed, split.lengths)
                cache[key] = _first_difference(plan.mask, own)
        return cache[key]

    for module, layer in layers.items():
        index = layer.index
        kind = types[index] if index is not None and index < len(types) else None
        named = kind in split.plans or None in split.plans
        own = split.plans.get(kind, split.plans.get(None))
        for plan in [own] if named and own else split.plans.values():
            if (apart := compare(plan, layer, kind)) is None:
                assigned[module] = plan
                break
        else:
            raise ValueError(_told(layer, kind, apart, split.lengths, config))
    return assigned


def _first_difference(mask: Mask, own: Mask) -> tuple[Pairs, Pairs] | None:
    if mask == own or mask.area == own.area == (mask & own).area:
        return None
    wide, narrow = (
        [(part.q.start, max(part.k.start, part.q.start + part.lo)) for part in left.slices[:1]]
        for left in (mask - own, own - mask)
    )
    return wide, narrow


def _told(
    layer: Layer, kind: str | None, apart: Any, lengths: Sequence[int], config: PretrainedConfig
) -> str:
    (wide, narrow), of = apart, kind or type(config).__name__
    for name, of_kind in (("sliding_window", WINDOW), ("attention_chunk_size", CHUNK)):
        if kind == of_kind:
            of += f", {name}={getattr(config, name, None)}"
    if wide:
        (q, k), how = wide[0], "wider than"
        what = f"token {q} attends token {k} in the plan and not in the layer"
    else:
        (q, k), how = narrow[0], "narrower than"
        what = f"token {q} attends token {k} in the layer and not in the plan"
    return (
        f"{layer.name} ({of}): the plan's mask is {how} the layer's own: {what} ({len(lengths)} "
        "documents); make the plans with ringattn.hf.make_plans(model, mask, layout), which gives "
        "every kind of layer its own"
    )
