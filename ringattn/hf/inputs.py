"""What a model may be called with on split sequences: this rank's part of one batch, and no
more."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from ringattn.execution.carriers import check_world, connect
from ringattn.hf.attention import PADDED, ActiveSplit
from ringattn.hf.batch import both_ways, positions_of

# What has an axis of tokens; nothing else is split with them.
_INPUTS = ("input_ids", "inputs_embeds", "position_ids", "attention_mask", "labels", "shift_labels")
_CACHES = ("past_key_values", "cache", "past_key_value", "cache_params")


def by_name(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of the model, by name."""
    signature = inspect.signature(model.forward)
    bound = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, p in signature.parameters.items():
        if p.kind is p.VAR_KEYWORD:
            bound |= bound.pop(name, {})
        if p.kind is p.VAR_POSITIONAL and bound.pop(name, ()):
            raise ValueError(
                f"{type(model).__name__}: call it with keywords, so that they are known"
            )
    return bound


def check_names(bound: dict[str, Any]) -> None:
    """Raises ValueError for arguments that the split does not know, and for a cache that holds
    something."""
    for name, x in bound.items():
        if name in _CACHES and x is not None and getattr(x, "get_seq_length", lambda: 1)():
            raise ValueError(f"{name}: cached decoding over split sequences is not covered")
        if name not in _INPUTS and isinstance(x, torch.Tensor) and x.dim():
            raise ValueError(
                f"{name} {list(x.shape)}: only {', '.join(_INPUTS)} are split with the tokens. "
                "Packed documents are told by the plan's mask; images and token types are not "
                "covered"
            )


def check_inputs(split: ActiveSplit, model: nn.Module, bound: dict[str, Any]) -> None:
    """Raises ValueError for inputs, by name, that are not this rank's part of sequences split as
    planned."""
    mask = bound.get("attention_mask")
    if isinstance(mask, torch.Tensor):
        if mask.dim() != 2:
            raise ValueError(
                "an attention_mask was given; with ringattn the plan's mask is the mask"
            )
        if not bool(mask.all()):
            raise ValueError(PADDED)
    positions = bound.get("position_ids")
    alone = split.any.world == 1
    if positions is None and (not alone or len(split.lengths) > 1):
        raise ValueError(
            "position_ids are missing: this rank's tokens do not stand at 0, 1, 2...; "
            "ringattn.hf.local_batch gives them with the tokens"
        )
    check_world(connect(split.group), split.any.world)
    want = positions_of(split.any.layout, split.rank, split.lengths)
    if positions is not None:
        same = positions.shape[-1] == len(want)
        if not same or not bool((positions == want.to(positions.device)).all()):
            raise ValueError(
                f"position_ids {positions.flatten()[:6].tolist()}... are not those of the plan, "
                f"whose mask holds {len(split.lengths)} documents with positions from 0: rank "
                f"{split.rank} has {len(want)} tokens at {want[:6].tolist()}...; "
                f"ringattn.hf.local_batch gives them"
            )
    shifted = bound.get("shift_labels")
    labels = bound.get("labels")
    by_token = isinstance(labels, torch.Tensor) and labels.dim() > 1
    alone = split.any.world == 1 or both_ways(split.plans) or shifted is not None
    if by_token and not alone and "TokenClassification" not in type(model).__name__:
        raise ValueError(
            "labels without shift_labels: the model would shift them on this rank's tokens; "
            "ringattn.hf.local_batch shifts them on the whole sequence"
        )
    counted = bound.get("num_items_in_batch") is not None or split.any.world == 1
    if (shifted is not None or by_token) and not counted:
        raise ValueError(
            "num_items_in_batch is missing: the loss would be a mean over this rank's own labels, "
            "and its gradient not that of one process. Give the number of labels that are "
            "supervised on all ranks; for logits alone, or a head that does not know it, leave "
            "labels and shift_labels out"
        )


def digest(bound: dict[str, Any]) -> list[int]:
    """What must be alike on all ranks of a sequence: sequences in the batch, and the count that
    the loss is divided by."""
    known = next((x for name in _INPUTS if (x := bound.get(name)) is not None), None)
    count = bound.get("num_items_in_batch")
    return [0 if known is None else len(known), 0 if count is None else int(count)]
