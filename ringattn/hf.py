"""Unchanged Hugging Face models on split sequences: ``attn_implementation="ringattn"``.

Importing this registers with transformers' AttentionInterface. The plan comes from a context
manager, :func:`split_sequence`, and belongs to the model for that time: nothing is patched, and a
recomputation in the backward, on whatever thread, finds it too.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ringattn.context import position_ids, shift_labels
from ringattn.execution.attention import ring_attention
from ringattn.planning import masks
from ringattn.planning.plan import Plan

NAME = "ringattn"
_HERE = "_ringattn_split"  # on every module of a model that is inside split_sequence


@dataclass
class _Split:
    plan: Plan
    group: Any
    kernel: str
    windows: set[int] = field(default_factory=set)  # known to hold for the plan's mask


@contextmanager
def split_sequence(
    model: nn.Module, plan: Plan, group: Any = None, kernel: str = "auto"
) -> Iterator[None]:
    """Inside, ``model`` (made with ``attn_implementation="ringattn"``) sees this rank's tokens of
    sequences split as ``plan`` says over ``group`` (None: the default one); the plan's mask is the
    mask. Both forward and backward belong inside.

    Raises RuntimeError if the model is inside one already; the model's forward then raises
    ValueError when it is not given the position_ids of a split sequence.
    """
    modules = list(model.modules())
    if hasattr(model, _HERE):
        raise RuntimeError("split_sequence: this model already has a plan")
    split = _Split(plan, group, kernel)
    for module in modules:
        object.__setattr__(module, _HERE, split)
    hook = model.register_forward_pre_hook(_need_positions, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        for module in modules:
            object.__delattr__(module, _HERE)


def local_batch(
    plan: Plan,
    rank: int,
    input_ids: torch.Tensor,
    labels: torch.Tensor | None = None,
    lengths: Sequence[int] | None = None,
) -> dict[str, torch.Tensor]:
    """What to call the model with on ``rank``, from whole sequences ``[batch, tokens]``.

    ``labels`` (default: the tokens) are as Hugging Face has them, not yet shifted; they are
    shifted here, before the split, and come as ``shift_labels``. ``lengths``: of packed documents,
    each of which then counts its positions from 0. For the mean over all tokens of the world give
    the model ``num_items_in_batch``, as the Trainer does.
    """
    own = torch.from_numpy(plan.layout.positions(rank)).to(input_ids.device)
    shifted = shift_labels(input_ids if labels is None else labels, lengths)[:, own]
    positions = position_ids(plan.layout, rank, lengths).to(input_ids.device)
    return {
        "input_ids": input_ids[:, own],
        "position_ids": positions.expand(len(input_ids), -1),
        "labels": shifted,
        "shift_labels": shifted,
    }


def _need_positions(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Without position_ids a model counts the local tokens from 0, and trains on that."""
    bound = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments | kwargs
    if len(getattr(model, _HERE).plan.layout.ranks) > 1 and bound.get("position_ids") is None:
        raise ValueError(
            "position_ids are missing: this rank's tokens do not stand at 0, 1, 2...; "
            "ringattn.hf.local_batch gives them with the tokens"
        )


def _attention(
    module: nn.Module,
    query: torch.Tensor,  # [batch, heads, local tokens, head_dim], as key and value
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    split: _Split | None = getattr(module, _HERE, None)
    if split is None:
        raise RuntimeError(
            'attn_implementation="ringattn" needs a plan: call the model inside '
            "`with ringattn.hf.split_sequence(model, plan, group):`"
        )
    if dropout:
        raise ValueError(f"attention_dropout={dropout}: ringattn has none; set it to 0")
    if attention_mask is not None:
        raise ValueError("an attention_mask was given; with ringattn the plan's mask is the mask")
    if not getattr(module, "is_causal", True):
        raise ValueError(f"{type(module).__name__} is not causal self-attention")
    if sliding_window is not None and sliding_window not in split.windows:
        mask = split.plan.mask
        if (mask & masks.sliding_window(mask.n_q, sliding_window)).area != mask.area:
            raise ValueError(
                f"the model has sliding_window={sliding_window} and the plan's mask reaches "
                "further: make the plan with masks.sliding_window(n, window), or set "
                "model.config.sliding_window to None"
            )
        split.windows.add(sliding_window)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = ring_attention(
        q, k, v, split.plan, split.group, split.kernel, scaling, softcap=softcap, sinks=s_aux
    )
    return out, None


def _no_mask(batch_size: int, attention_mask: torch.Tensor | None = None, **_: Any) -> None:
    """transformers then makes no mask of [tokens, tokens]; one that pads is refused, not lost."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError(
            "attention_mask has zeros; with ringattn the plan's mask is the mask: pack documents "
            "(masks.documents(lengths)) instead of padding them"
        )


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _no_mask)
