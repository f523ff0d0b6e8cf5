"""Which modules of a model mix tokens: seen by what they do, on a few tokens, before the first
forward.

While it is probed every token attends itself only. So no output may move but that of a token that
has been changed; what moves another token (a recurrence, a convolution, attention of its own, a
router that drops tokens) mixes tokens in a way that this project would run on each shard alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

from ringattn.batches import IGNORED
from ringattn.hf.attention import HERE, Layer, Probe, Split

TOKENS = 13  # of a probe: no size of a model, so that the axis of tokens is known
# All tokens alike or not, which one changes, and to how many others: where all are alike they
# choose one expert, and the first one makes room for others if it leaves.
_TRIALS = (("alike", 0, 4), ("mixed", 4, 2))
_SURE = 2
_Rows = list[tuple[torch.Tensor, float]]  # see _by_token


class NotCovered(ValueError):
    """The model cannot be trained on split sequences; the message names the module and the
    reason."""


def language_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model in ``model``, which may be wrapped. Raises NotCovered."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise NotCovered(f"{type(model).__name__} holds no model of transformers")


def probe(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[nn.Module, Layer]:
    """The attention layers of ``model``, each with its own mask, from a few calls like
    ``model(*args, **kwargs)`` on a few tokens, without gradient. Collective where the weights are
    split over ranks.

    Raises NotCovered for a model in which tokens meet elsewhere, that fails, or that has no such
    layer.
    """
    inside = language_model(model)
    name = type(inside).__name__
    if getattr(inside.config, "is_encoder_decoder", False):
        raise NotCovered(f"{name} is an encoder and a decoder: cross attention is not covered")
    split: Split = getattr(model, HERE)
    split.probe = Probe({module: path for path, module in inside.named_modules()})
    try:
        with torch.no_grad(), evaluating(model):
            for start, token, changes in _TRIALS:
                first = _run(model, inside, args, kwargs, start, token, 0)
                leaks: Counter[str] = Counter()
                for change in range(1, changes + 1):
                    second = _run(model, inside, args, kwargs, start, token, change)
                    leaks.update(_leaks(first, second, token))
                    if found := [path for path, count in leaks.items() if count >= _SURE]:
                        raise NotCovered(_reason(inside, found, token))
        layers = split.probe.layers
    finally:
        split.probe = None
    if not layers:
        raise NotCovered(f"{name}: no layer calls transformers' attention interface")
    return layers


def probed(model: nn.Module, ids: torch.Tensor) -> dict[nn.Module, Layer]:
    """:func:`probe` of a model outside of a split."""
    modules = list(model.modules())
    split = Split({}, None, "auto", [])
    for module in modules:
        object.__setattr__(module, HERE, split)
    try:
        return probe(model, (), {"input_ids": ids.to(next(model.parameters()).device)})
    finally:
        for module in modules:
            object.__delattr__(module, HERE)


def _reason(model: nn.Module, leaks: list[str], token: int) -> str:
    deepest = max(leaks, key=lambda path: path.count("."))
    module = model.get_submodule(deepest)
    return (
        f"{deepest or type(model).__name__} ({type(module).__name__}) mixes tokens without "
        f'attn_implementation="ringattn": when token {token} was changed, others moved that do '
        "not attend it. A recurrence, a convolution, attention of its own, or a router with a "
        "capacity would see this rank's shard only"
    )


def _run(
    model: nn.Module,
    inside: PreTrainedModel,
    args: tuple,
    kwargs: dict[str, Any],
    start: str,
    token: int,
    change: int,
) -> dict[str, tuple[_Rows, _Rows]]:
    """What went into and came out of every module, those tensors that have an axis of tokens."""
    seen: dict[str, tuple[_Rows, _Rows]] = {}

    def hook(path: str) -> Any:
        def record(_: nn.Module, ins: tuple, more: dict, out: Any) -> None:
            seen[path] = (_by_token((ins, more)), _by_token(out))

        return record

    ids = torch.arange(TOKENS) if start == "mixed" else torch.full((TOKENS,), 7)
    ids[token] += change
    handles = [
        module.register_forward_hook(hook(path), with_kwargs=True)
        for path, module in inside.named_modules()
    ]
    try:
        args, kwargs = shortened(inside, args, kwargs, ids)
        out = model(*args, **kwargs)
        check_loss(inside, kwargs, out)
    except ValueError:
        raise
    except Exception as error:
        raise NotCovered(
            f"{type(inside).__name__} fails on a short probe with "
            f'attn_implementation="ringattn": {type(error).__name__}: {error}'
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return seen


def shortened(
    model: PreTrainedModel, args: tuple, kwargs: dict[str, Any], ids: torch.Tensor
) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call like this one, of the tokens ``ids`` ``[tokens]`` alone: token ids,
    embeddings (random), positions from 0, labels."""
    table = model.get_input_embeddings()
    known = kwargs.get("input_ids", kwargs.get("inputs_embeds"))
    known = next((x for x in args if isinstance(x, torch.Tensor)), None) if known is None else known
    device = known.device if known is not None else model.device
    size = getattr(table, "num_embeddings", model.config.get_text_config().vocab_size)
    ids = (ids % size).to(device)[None]
    local = tuple(known.shape[:2]) if known is not None else ()

    def short(x: Any, name: str = "") -> Any:
        if not isinstance(x, torch.Tensor) or x.dim() == 0:
            return x
        if name == "position_ids":
            positions = torch.arange(ids.shape[1], device=device)
            return positions.expand(*x.shape[:-2], 1, ids.shape[1])
        if x.shape[:2] != local:
            return x
        if x.is_floating_point():
            rows = torch.randn(size, x.shape[-1], generator=torch.Generator().manual_seed(0))
            return rows.to(x)[ids]
        if name in ("labels", "shift_labels"):
            return torch.where(ids % 3 == 0, IGNORED, ids)
        return torch.ones_like(ids).to(x.dtype) if name == "attention_mask" else ids

    kwargs = {name: short(x, name) for name, x in kwargs.items()}
    return tree_map(short, args), kwargs


def check_loss(model: nn.Module, kwargs: dict[str, Any], out: Any) -> None:
    """Raises NotCovered if the loss that came out is not that of ``shift_labels`` over
    ``num_items_in_batch``, both of which a model may ignore."""
    labels, count = kwargs.get("shift_labels"), kwargs.get("num_items_in_batch")
    loss, logits = getattr(out, "loss", None), getattr(out, "logits", None)
    if labels is None or loss is None or logits is None or logits.shape[:2] != labels.shape:
        return
    total = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    want = total / (count if count is not None else (labels != IGNORED).sum().clamp(min=1))
    aux = getattr(out, "aux_loss", None)
    if isinstance(aux, torch.Tensor):
        want = want + router_weight(model) * aux
    error = float((loss.float() - want).abs())
    if error > 0.02 * float(want.abs()) + 1e-3:
        raise NotCovered(
            f"{type(model).__name__}: its loss is {float(loss):.4f}, and by shift_labels"
            + (" over num_items_in_batch" if count is not None else "")
            + f" it is {float(want):.4f}: it ignores one of them; take the logits, and "
            "ringattn.context.loss_sum of them"
        )


def router_weight(model: nn.Module) -> float:
    """What the router loss is multiplied by in the model's loss."""
    for where in (model, model.config, model.config.get_text_config()):
        if (weight := getattr(where, "router_aux_loss_coef", None)) is not None:
            return float(weight)
    raise NotCovered(f"{type(model).__name__} has a router loss and no router_aux_loss_coef")


def _by_token(tree: Any) -> _Rows:
    """The floating-point tensors with an axis of tokens, as ``[tokens, ...]``, and what is noise in
    each, relative to its largest element: rows of a product may round differently when others
    change.
    """
    rows = []
    for x in tree_leaves(_opened(tree)):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            continue
        if x.dim() > 1 and x.shape[:2] == (1, TOKENS):
            rows.append(x.detach()[0].flatten(1) if x.dim() > 2 else x.detach().T)
        elif x.dim() > 1 and x.shape[0] == TOKENS:
            rows.append(x.detach().flatten(1))
    return [
        (x.float().cpu(), (64 if x.itemsize > 2 else 4) * torch.finfo(x.dtype).eps) for x in rows
    ]


def _opened(tree: Any) -> Any:
    """Outputs of transformers are mappings that torch's trees may not know."""
    if isinstance(tree, dict):
        return [_opened(x) for x in tree.values()]
    return [_opened(x) for x in tree] if isinstance(tree, (tuple, list)) else tree


def _leaks(first: dict, second: dict, token: int) -> dict[str, int]:
    """The modules of which rows of other tokens have moved at the end and not at the beginning; as
    often as it takes to be sure, if there nothing has moved at all: where something has, by
    rounding, a router on the edge may send a token elsewhere."""
    leaks, others = {}, torch.arange(TOKENS) != token
    for path, (before, after) in second.items():
        if not before or path not in first:
            continue
        went = _moved(first[path][1], after) & others
        if bool((went & ~_moved(first[path][0], before)).any()):
            same = not bool((went & _moved(first[path][0], before, exactly=True)).any())
            leaks[path] = _SURE if same else 1
    return leaks


def _moved(first: _Rows, second: _Rows, exactly: bool = False) -> torch.Tensor:
    moved = torch.zeros(TOKENS, dtype=torch.bool)
    for (a, noise), (b, _) in zip(first, second, strict=False):
        if a.shape == b.shape and a.numel():
            limit = 0.0 if exactly else noise * float(b.abs().max().clamp(min=1e-6))
            moved |= ~((a - b).abs().amax(1) <= limit)
    return moved


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards every module is in its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
