"""A running proof: the split model beside the same model in one process, on a short sequence."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ringattn.execution.carriers import connect
from ringattn.hf import agree
from ringattn.hf.attention import HERE, ActiveSplit
from ringattn.hf.compiled import uncompiled
from ringattn.hf.coverage import evaluating, shortened
from ringattn.hf.inside import by_transformers, installed
from ringattn.make import make_plan
from ringattn.planning import layouts, masks
from ringattn.planning.masks import Mask
from ringattn.planning.runs import Run

_ALSO = ("position_ids", "use_cache", "output_router_logits")  # that a body may take
_TOKENS = 96
_DOCUMENTS = 4


def compare(
    model: PreTrainedModel, kwargs: dict[str, Any], call: Callable[..., Any] | None = None
) -> bool:
    """Computes a part of the sequence, from the beginning of its longest document (up to 4
    documents; 96 tokens, or twice the largest window below 512), split, and by transformers' eager
    attention in one process, before and after one token is changed: the same outputs must move, and
    be the same. Inside split_sequence, for calls like ``model(**kwargs)``, or ``call`` around it;
    collective, without gradient.

    False, and nothing is done, where what all layers share is a mask of the user's own:
    transformers has none to compare with. Raises ValueError on all ranks, with the token that
    differs most.
    """
    split: ActiveSplit = getattr(model, HERE)
    call = call or model
    begin, lengths = _part_of(split)
    n = sum(lengths)
    shared = getattr(split.plans, "shared", None)
    if shared is not None:
        documents = [masks.documents(lengths, causal).area for causal in (True, False)]
        if part(shared, begin, n).area not in documents:
            return False
    layout = layouts.zigzag(n, split.any.world)
    plans = {
        id(plan): make_plan(part(plan.mask, begin, n), layout, plan.schedule, plan.ulysses,
                            node_size=plan.node_size)
        for plan in split.plans.values()
    }  # fmt: skip
    own = torch.from_numpy(layout.positions(split.rank))
    everywhere = torch.cat([torch.arange(length) for length in lengths])
    # In one process packed documents are one call, told by their positions, which not all models
    # look at; or a call each, in which what depends on the length of all (RoPE, Llama 4's scale)
    # differs.
    ways = [[n], lengths]
    inner = ActiveSplit({None: next(iter(plans.values()))}, split.group, split.kernel, lengths)
    inner.of = {module: plans[id(plan)] for module, plan in split.of.items()}
    inner.checking = True
    wrong = None
    quiet = (torch.no_grad(), uncompiled(model), evaluating(call), evaluating(model))
    with ExitStack() as stack:
        for each in (*quiet, installed(model, inner)):
            stack.enter_context(each)
        inputs = [_inputs(model, kwargs, n, change) for change in (0, 1)]
        with _coarsest(model) as sizes:
            ours = [_result(call(**_rows(each, own, everywhere[own]))) for each in inputs]
        half = min(sizes, default=4) < 4
        for ends in ways:
            theirs = []
            with _in_one_process(model, inner):
                for each in inputs:
                    parts = torch.arange(n).split(ends)
                    outs = [_result(call(**_rows(each, rows, everywhere[rows]))) for rows in parts]
                    theirs.append(torch.cat(outs, 1)[:, own.to(outs[0].device)])
            if (wrong := _judged(split, ours, theirs, own, half)) is None:
                return max(lengths) > 1
    raise ValueError(wrong)


def _judged(
    split: ActiveSplit, ours: list[torch.Tensor], theirs: list[torch.Tensor], own: torch.Tensor,
    half: bool,
) -> str | None:  # fmt: skip
    """What is wrong, the same on all ranks: outputs that are apart, or that moved otherwise.
    ``half``: they were computed in half precision."""
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
    # Of a router that is on the edge for a token, rounding decides: in half precision of many. What
    # is then left to see, a wrong scale or softcap, is wrong nearly everywhere.
    if count <= (0.5 if half else 0.03) * tokens:
        return None
    token, error = everyone[everyone[:, 3].argmax(), 2:].tolist()
    return (
        f"ringattn.hf.check: of {tokens} tokens {count} differ from the same model in one "
        f"process with eager attention, token {token:.0f} by {error:.3g} of its size (in "
        f"{'half precision' if half else 'float32'}): the split model is not the model"
    )


def part(mask: Mask, begin: int, n: int) -> Mask:
    """The mask of ``n`` tokens from ``begin`` on."""
    run = (begin, begin + n)
    inside = mask & masks.from_slices([(run, run, None, None)], mask.n_q, mask.n_k)
    moved = (
        replace(each, q=_moved(each.q, begin), k=_moved(each.k, begin)) for each in inside.slices
    )
    return Mask(tuple(moved), n, n)


def _moved(run: Run, begin: int) -> Run:
    return Run(run.start - begin, run.stop - begin, run.step)


def _part_of(split: ActiveSplit) -> tuple[int, list[int]]:
    """Where the part that is computed begins, and the lengths of the documents in it."""
    wanted = _TOKENS
    for plan in split.plans.values():
        edges = [-part.lo for part in plan.mask.slices[:64] if 0 < -part.lo < 512]
        wanted = max([wanted, *(2 * edge for edge in edges)])
    longest = max(range(len(split.lengths)), key=split.lengths.__getitem__)
    lengths = []
    for length in split.lengths[longest : longest + _DOCUMENTS]:
        if wanted:
            lengths.append(min(length, wanted))
            wanted -= lengths[-1]
    return sum(split.lengths[:longest]), lengths


def _inputs(model: PreTrainedModel, kwargs: dict[str, Any], n: int, change: int) -> dict[str, Any]:
    """Of ``n`` tokens, the first of them one or another."""
    ids = torch.arange(n) * 7 % 29
    ids[0] += change
    without = ("labels", "shift_labels", "num_items_in_batch", "attention_mask")
    # What its class does not name is somebody else's (TRL's switch of its own head), and about
    # labels.
    named = [*inspect.signature(type(model).forward).parameters, *_ALSO]
    given = {k: x for k, x in kwargs.items() if k in named and k not in without}
    return shortened(model, given, ids)


def _rows(kwargs: dict[str, Any], rows: torch.Tensor, positions: torch.Tensor) -> dict[str, Any]:
    """Of the arguments those tokens, at those positions."""
    named = {
        name: x[:, rows.to(x.device)] if isinstance(x, torch.Tensor) and x.dim() > 1 else x
        for name, x in kwargs.items()
        if name != "position_ids"
    }
    shape = kwargs["position_ids"].shape if "position_ids" in kwargs else (1, len(rows))
    device = next(x.device for x in named.values() if isinstance(x, torch.Tensor))
    named["position_ids"] = positions.to(device).expand(*shape[:-2], 1, len(rows))
    return named


@contextmanager
def _coarsest(model: nn.Module) -> Iterator[set[int]]:
    """Bytes of the elements that modules give. What the model itself gives says less: where
    accelerate has autocast compute in bf16, it is made float32 again."""
    sizes: set[int] = set()

    def see(module: nn.Module, given: Any, out: Any) -> None:
        if isinstance(out, torch.Tensor) and out.is_floating_point():
            sizes.add(out.itemsize)

    hooks = [module.register_forward_hook(see) for module in model.modules()]
    try:
        yield sizes
    finally:
        for hook in hooks:
            hook.remove()


def _result(out: Any) -> torch.Tensor:
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(out, name, None), torch.Tensor):
            return getattr(out, name)
    return next(x for x in out if isinstance(x, torch.Tensor))


@contextmanager
def _in_one_process(model: nn.Module, split: ActiveSplit) -> Iterator[None]:
    """Attention by transformers itself, of whole sequences."""
    split.whole = True
    try:
        with by_transformers(model, "eager"):
            yield
    finally:
        split.whole = False
