"""Which modules of a model mix tokens: seen by what they do, on a few tokens, before the first
forward.

While it is probed every token attends itself only. So no output may move but that of a token that
has been changed; what moves another token (a recurrence, a convolution, attention of its own, a
router that drops tokens) mixes tokens in a way that this project would run on each shard alone.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ringattn.batches import IGNORED
from ringattn.hf.attention import HERE, ActiveSplit, Layer, Probe
from ringattn.hf.compiled import uncompiled
from ringattn.hf.inside import installed
from ringattn.hf.mixers import has_mixers, opened

TOKENS = 13  # of a probe: no size of a model, so that the axis of tokens is known
# All tokens alike or not, which one changes, and to how many others: where all are alike they
# choose one expert, and the first one makes room for others if it leaves.
_TRIALS = (("alike", 0, 4), ("mixed", 4, 2))
_SURE = 2
_Rows = list[tuple[torch.Tensor, float]]  # see _by_token


class NotCovered(ValueError):
    """The model cannot be trained on split sequences; the message names the module and the
    reason."""


class Mixes(NotCovered):
    """Modules mix tokens by themselves; ``paths``: which, and what they are in."""

    def __init__(self, message: str, paths: list[str]) -> None:
        super().__init__(message)
        self.paths = paths


def language_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model in ``model``, which may be wrapped. Raises NotCovered."""
    if hasattr(model, "_orig_mod"):
        raise NotCovered(
            "a model that is compiled as a whole is not covered; compile its layers: "
            "ringattn.hf.compile_layers"
        )
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise NotCovered(f"{type(model).__name__} holds no model of transformers")


def probe(
    model: PreTrainedModel,
    kwargs: dict[str, Any],
    call: Callable[..., Any] | None = None,
    without_attention: bool = False,
) -> dict[nn.Module, Layer]:
    """The attention layers of ``model``, each with its own mask, from a few calls like
    ``model(**kwargs)`` on a few tokens, without gradient; ``call``: what is called in place of the
    model, around it; ``without_attention``: whether there may be no such layer. Collective where
    the weights are split over ranks.

    Raises NotCovered for a model in which tokens meet elsewhere, that fails, that has no such
    layer, or whose positions do not begin at 0.
    """
    name, call = type(model).__name__, call or model
    if getattr(model.config, "is_encoder_decoder", False):
        raise NotCovered(f"{name} is an encoder and a decoder: cross attention is not covered")
    split: ActiveSplit = getattr(model, HERE)
    split.probe = Probe({module: path for path, module in model.named_modules()})
    try:
        with torch.no_grad(), uncompiled(model), evaluating(call), evaluating(model):
            for start, token, changes in _TRIALS:
                first = _run(model, call, kwargs, start, token, 0)
                leaks: Counter[str] = Counter()
                for change in range(1, changes + 1):
                    second = _run(model, call, kwargs, start, token, change)
                    leaks.update(_leaks(first, second, token))
                    if found := [path for path, count in leaks.items() if count >= _SURE]:
                        raise Mixes(_reason(model, found, token), found)
            if not first.get("", ([], []))[1]:
                raise NotCovered(
                    f"{name} gives nothing by token (it pools them, or keeps some only): this "
                    "rank's tokens are not all of the sequence"
                )
            _check_first_position(model, call, kwargs)
        layers = split.probe.layers
    finally:
        split.probe = None
    if not layers and not without_attention and not has_mixers(model):
        raise NotCovered(f"{name}: no layer calls transformers' attention interface")
    return layers


def _check_first_position(
    model: PreTrainedModel, call: Callable[..., Any], kwargs: dict[str, Any]
) -> None:
    """Raises NotCovered where positions that are not given do not begin at 0."""
    if kwargs.get("position_ids") is None:
        return
    told = shortened(model, kwargs, torch.arange(TOKENS) + 7)  # no token that pads
    outs = [call(**told), call(**{k: x for k, x in told.items() if k != "position_ids"})]
    shifted, usual = (_by_token(out) for out in outs)
    if bool(_moved(shifted, usual).any()):
        raise NotCovered(
            f"{type(model).__name__}: its positions do not begin at 0 (with RoBERTa they begin "
            "after the padding's): what it is given here would be others"
        )


def takes(model: PreTrainedModel, name: str) -> bool:
    """Whether its forward takes an argument, or hands it on to a model inside that does."""
    parameters = inspect.signature(model.forward).parameters
    if name in parameters:
        return True
    inside = (m for m in model.children() if isinstance(m, PreTrainedModel))
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return open_ended and any(takes(m, name) for m in inside)


def probed(model: nn.Module, ids: torch.Tensor) -> dict[nn.Module, Layer]:
    """:func:`probe` of a model outside of a split."""
    inside = language_model(model)
    with installed(inside, ActiveSplit({}, None, "auto", [])):
        inputs = {"input_ids": ids.to(next(inside.parameters()).device)}
        return probe(inside, inputs | ({"use_cache": False} if takes(inside, "use_cache") else {}))


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
    model: PreTrainedModel,
    call: Callable[..., Any],
    kwargs: dict[str, Any],
    start: str,
    token: int,
    change: int,
) -> dict[str, tuple[_Rows, _Rows]]:
    """What went into and came out of every module, those tensors that have an axis of tokens."""
    seen: dict[str, tuple[_Rows, _Rows]] = {}

    def hook(path: str) -> Any:
        def record(_: nn.Module, ins: tuple[Any, ...], more: dict[str, Any], out: Any) -> None:
            seen[path] = (_by_token((ins, more)), _by_token(out))

        return record

    ids = torch.arange(TOKENS) if start == "mixed" else torch.full((TOKENS,), 7)
    ids[token] += change
    handles = [
        module.register_forward_hook(hook(path), with_kwargs=True)
        for path, module in model.named_modules()
    ]
    try:
        named = shortened(model, kwargs, ids)
        check_loss(model, named, call(**named))
    except ValueError:
        raise
    except Exception as error:
        raise NotCovered(
            f"{type(model).__name__} fails on a short probe with "
            f'attn_implementation="ringattn": {type(error).__name__}: {error}'
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return seen


def shortened(model: PreTrainedModel, kwargs: dict[str, Any], ids: torch.Tensor) -> dict[str, Any]:
    """The arguments of a call like this one, of the tokens ``ids`` ``[tokens]`` alone: token ids,
    embeddings (random), positions from 0, labels."""
    names = ("input_ids", "inputs_embeds")
    known = next(kwargs[name] for name in names if kwargs.get(name) is not None)
    table, local = model.get_input_embeddings(), tuple(known.shape[:2])
    size = getattr(table, "num_embeddings", model.config.get_text_config().vocab_size)
    ids = (ids % size).to(known.device)[None]

    def short(name: str, x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or x.dim() == 0:
            return x
        if name == "position_ids":
            positions = torch.arange(ids.shape[1], device=known.device)
            return positions.expand(*x.shape[:-2], 1, ids.shape[1])
        if x.shape[:2] != local:
            return x
        if x.is_floating_point():
            generator = torch.Generator().manual_seed(0)
            rows = torch.randn(int(ids.max()) + 1, x.shape[-1], generator=generator)
            return rows.to(x)[ids]
        if name in ("labels", "shift_labels"):
            return torch.where(ids % 3 == 0, IGNORED, ids)
        return torch.ones_like(ids).to(x.dtype) if name == "attention_mask" else ids

    return {name: short(name, x) for name, x in kwargs.items()}


def check_loss(model: nn.Module, kwargs: dict[str, Any], out: Any) -> None:
    """Raises NotCovered if the loss that came out is not that of the labels (shifted ones, if they
    are given) over ``num_items_in_batch``, any of which a model may ignore."""
    shifted, labels = kwargs.get("shift_labels"), kwargs.get("labels")
    loss, logits = getattr(out, "loss", None), getattr(out, "logits", None)
    labels = labels if shifted is None else shifted
    if labels is None or loss is None or logits is None or logits.shape[:2] != labels.shape:
        return
    count, aux = kwargs.get("num_items_in_batch"), getattr(out, "aux_loss", None)

    def of(labels: torch.Tensor) -> torch.Tensor:
        total = nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        value = total / (count if count is not None else (labels != IGNORED).sum().clamp(min=1))
        return value + router_weight(model) * aux if isinstance(aux, torch.Tensor) else value

    wants = [of(labels)]
    if shifted is None:  # in a world of one the model may shift them itself
        wants.append(of(nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)))
    if all(float((loss.float() - x).abs()) > 0.02 * float(x.abs()) + 1e-3 for x in wants):
        raise NotCovered(
            f"{type(model).__name__}: its loss is {float(loss):.4f}, and by "
            + ("labels" if shifted is None else "shift_labels")
            + (" over num_items_in_batch" if count is not None else "")
            + f" it is {float(wants[0]):.4f}: it ignores one of them; take the logits, and "
            "ringattn.context.loss_sum of them"
        )


def router_weight(model: nn.Module) -> float:
    """What the router loss is multiplied by in the model's loss."""
    config: Any = model.config
    for where in (model, config, config.get_text_config()):
        if (weight := getattr(where, "router_aux_loss_coef", None)) is not None:
            return float(weight)
    raise NotCovered(f"{type(model).__name__} has a router loss and no router_aux_loss_coef")


def _by_token(tree: Any) -> _Rows:
    """The floating-point tensors with an axis of tokens, as ``[tokens, ...]``, and what is noise in
    each, relative to its largest element: rows of a product may round differently when others
    change.
    """
    rows = []
    for x in tree_leaves(opened(tree)):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            continue
        if x.dim() > 1 and x.shape[:2] == (1, TOKENS):
            rows.append(x.detach()[0].flatten(1) if x.dim() > 2 else x.detach().T)
        elif x.dim() > 1 and x.shape[0] == TOKENS:
            rows.append(x.detach().flatten(1))
    return [
        (x.float().cpu(), (64 if x.itemsize > 2 else 4) * torch.finfo(x.dtype).eps) for x in rows
    ]


def _leaks(first: dict[str, Any], second: dict[str, Any], token: int) -> dict[str, int]:
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
def evaluating(model: Any) -> Iterator[None]:
    """Without dropout; afterwards every module is in its own mode again."""
    if not isinstance(model, nn.Module):
        yield
        return
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
