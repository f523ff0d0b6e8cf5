"""A running proof: the split model beside the same model in one process, on a short sequence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ringattn.execution.carriers import connect
from ringattn.hf import agree
from ringattn.hf.attention import HERE, NAME, Split
from ringattn.hf.coverage import evaluating, language_model, shortened
from ringattn.make import make_plan
from ringattn.planning import layouts, masks
from ringattn.planning.masks import Mask
from ringattn.planning.plan import Plan

_TOKENS = 96
_DOCUMENTS = 4


def compare(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Computes the beginning of the sequence (up to 4 documents; 96 tokens, or twice the largest
    window below 512) split, and by transformers' eager attention in one process, before and after
    one token is changed: the same outputs must move, and be the same. Inside split_sequence, for
    calls like ``model(*args, **kwargs)``; collective, without gradient.

    Where what all layers share is a mask of the user's own, transformers has none to compare with,
    and nothing is done. Raises ValueError on all ranks, with the token that differs most.
    """
    split: Split = getattr(model, HERE)
    shared = getattr(split.plans, "shared", None) or union(split.plans.values())
    n, lengths = _beginning(split, shared)
    short = first(shared, n)
    causal = masks.documents(lengths, causal=True)
    both_ways = masks.documents(lengths, causal=False)
    if short.area not in (causal.area, both_ways.area):
        return  # a mask of the user's own
    layout = layouts.zigzag(n, split.any.world)
    plans = {
        id(plan): make_plan(first(plan.mask, n), layout, plan.schedule, plan.ulysses,
                            node_size=plan.node_size)
        for plan in split.plans.values()
    }  # fmt: skip
    own = torch.from_numpy(layout.positions(split.rank))
    everywhere = torch.cat([torch.arange(length) for length in lengths])
    positions = everywhere[own]
    # In one process packed documents are one call, told by their positions, which not all models
    # look at; or a call each, in which what depends on the length of all (RoPE, Llama 4's scale)
    # differs.
    ways = [[n], lengths] if short.area == causal.area else [lengths]
    inner = Split({None: next(iter(plans.values()))}, split.group, split.kernel, lengths)
    inner.of = {module: plans[id(plan)] for module, plan in split.of.items()}
    inner.checking = True
    wrong = None
    with evaluating(model), torch.no_grad(), _standing_in(model, inner):
        inputs = [_inputs(model, args, kwargs, n, change) for change in (0, 1)]
        local = [_part(own, positions, *each) for each in inputs]
        ours = [_result(model(*arguments, **named)) for arguments, named in local]
        for parts in ways:
            theirs = []
            with _in_one_process(model, inner):
                for each in inputs:
                    rows = torch.arange(n).split(parts)
                    calls = [_part(part, everywhere[part], *each) for part in rows]
                    outs = [_result(model(*arguments, **named)) for arguments, named in calls]
                    theirs.append(torch.cat(outs, 1)[:, own.to(outs[0].device)])
            if (wrong := _judged(split, ours, theirs, own)) is None:
                return
    raise ValueError(wrong)


def _judged(
    split: Split, ours: list[torch.Tensor], theirs: list[torch.Tensor], own: torch.Tensor
) -> str | None:
    """What is wrong, the same on all ranks: outputs that are apart, or that moved otherwise."""
    half = ours[0].dtype.itemsize < 4
    size = theirs[0].float().norm(dim=-1).clamp(min=1e-6)
    apart = (ours[0] - theirs[0]).float().norm(dim=-1) / size
    moved = ((ours[1] - ours[0]) - (theirs[1] - theirs[0])).float().norm(dim=-1) / size
    worst = torch.maximum(apart, moved)[0].nan_to_num(torch.inf).cpu()
    wrong = worst > (0.1 if half else 1e-3)
    at = int(worst.argmax()) if len(own) else None
    report = [
        wrong.sum(),
        len(wrong),
        -1 if at is None else own[at],
        0 if at is None else worst[at],
    ]
    everyone = agree.gather(connect(split.group), torch.tensor(report, dtype=torch.float64))
    count, tokens = int(everyone[:, 0].sum()), int(everyone[:, 1].sum())
    # Of a router that is on the edge for a token, rounding decides.
    if count <= (0.1 if half else 0.03) * tokens:
        return None
    token, error = everyone[everyone[:, 3].argmax(), 2:].tolist()
    return (
        f"ringattn.hf.check: of {tokens} tokens {count} differ from the same model in one "
        f"process with eager attention, token {token:.0f} by {error:.3g} of its size: the split "
        f"model is not the model"
    )


def first(mask: Mask, n: int) -> Mask:
    """The mask of the first ``n`` tokens."""
    whole = masks.from_slices([((0, n), (0, n), None, None)], mask.n_q, mask.n_k)
    return Mask((mask & whole).slices, n, n)


def union(plans: Iterable[Plan]) -> Mask:
    mask, *others = [plan.mask for plan in plans]
    for other in others:
        mask = mask | other
    return mask


def _beginning(split: Split, shared: Mask) -> tuple[int, list[int]]:
    """How many tokens of the sequence are computed, and the lengths of the documents in them."""
    wanted = _TOKENS
    for plan in split.plans.values():
        edges = [-part.lo for part in plan.mask.slices[:64] if 0 < -part.lo < 512]
        wanted = max([wanted, *(2 * edge for edge in edges)])
    n = min(shared.n_q, wanted, sum(split.lengths[:_DOCUMENTS]))
    lengths, left = [], n
    for length in split.lengths:
        if left:
            lengths.append(min(length, left))
            left -= lengths[-1]
    return n, lengths


def _bare(kwargs: dict[str, Any]) -> dict[str, Any]:
    without = ("labels", "shift_labels", "num_items_in_batch", "attention_mask")
    return {name: x for name, x in kwargs.items() if name not in without}


def _inputs(
    model: nn.Module, args: tuple, kwargs: dict[str, Any], n: int, change: int
) -> tuple[tuple, dict[str, Any]]:
    ids = torch.arange(n) * 7 % 29
    ids[0] += change
    return shortened(language_model(model), args, _bare(kwargs), ids)


def _part(
    rows: torch.Tensor, positions: torch.Tensor, args: tuple, kwargs: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Of the arguments those tokens, at those positions."""

    def take(x: Any) -> Any:
        split = isinstance(x, torch.Tensor) and x.dim() > 1
        return x[:, rows.to(x.device)] if split else x

    named = {name: take(x) for name, x in kwargs.items() if name != "position_ids"}
    shape = kwargs["position_ids"].shape if "position_ids" in kwargs else (1, len(rows))
    device = next(x.device for x in (*args, *named.values()) if isinstance(x, torch.Tensor))
    named["position_ids"] = positions.to(device).expand(*shape[:-2], 1, len(rows))
    return [take(x) for x in args], named


def _result(out: Any) -> torch.Tensor:
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(out, name, None), torch.Tensor):
            return getattr(out, name)
    return next(x for x in out if isinstance(x, torch.Tensor))


@contextmanager
def _standing_in(model: nn.Module, split: Split) -> Iterator[None]:
    """Another split on every module."""
    before = [
        (module, getattr(module, HERE)) for module in model.modules() if hasattr(module, HERE)
    ]
    for module, _ in before:
        object.__setattr__(module, HERE, split)
    try:
        yield
    finally:
        for module, own in before:
            object.__setattr__(module, HERE, own)


@contextmanager
def _in_one_process(model: nn.Module, split: Split) -> Iterator[None]:
    """Attention by transformers itself, of whole sequences."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    ours = [c for c in configs.values() if getattr(c, "_attn_implementation", None) == NAME]
    split.whole = True
    for config in ours:
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        split.whole = False
        for config in ours:
            config._attn_implementation = NAME
