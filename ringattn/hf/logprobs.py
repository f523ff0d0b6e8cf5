"""``token_logprobs``: what losses of reinforcement learning and of preferences are made of."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from ringattn.hf.attention import HERE
from ringattn.hf.coverage import language_model
from ringattn.hf.head import check_labels, scoring
from ringattn.hf.mixers import has_mixers
from ringattn.hf.split import split_sequence
from ringattn.hf.whole import Gathered
from ringattn.planning.layer_plans import LayerPlans
from ringattn.planning.plan import Plan


def token_logprobs(
    model: nn.Module,
    batch: Mapping[str, torch.Tensor],
    plans: Plan | Mapping[str, Plan],
    group: Any = None,
    *,
    gather: bool = False,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> torch.Tensor:
    """Log-probabilities of the labels of ``batch``, which is of :func:`ringattn.hf.local_batch`:
    float32 ``[batch, local tokens]``, 0 where a token has no label. Logits of all tokens never
    exist: the head runs on ``chunk`` tokens at a time, and again in the backward.

    With ``gather`` those of whole sequences, ``[batch, tokens]``, on every rank of ``group``: each
    stands with the token before the one that it is of. A loss that every rank computes from them
    has on each rank the gradient of its own tokens; summed over the ranks that is the loss's, as it
    is for losses of local tokens. ``temperature``: logits are divided by it.

    Differentiable. Inside of :func:`ringattn.hf.split_sequence` it uses that; outside it makes one
    for this forward.

    Raises ValueError as split_sequence does, and for a model whose logits are not its head's
    product with its hidden states, times a factor or with a softcap; RuntimeError outside of
    split_sequence where a backward would compute layers again (gradient checkpointing, layers with
    a state).

    >>> with ringattn.hf.split_sequence(model, plans, group):
    ...     new = ringattn.hf.token_logprobs(model, batch, plans, group)
    ...     ratio = (new - old).exp()
    ...     (-(ratio * advantage).sum() / count).backward()
    """
    inside = language_model(model)
    active = getattr(inside, HERE, None)
    if batch.get("shift_labels") is None:
        raise ValueError("token_logprobs: the batch has no shift_labels; local_batch gives them")
    check_labels(batch["shift_labels"])
    if active is None and torch.is_grad_enabled():
        again = any(getattr(m, "gradient_checkpointing", False) for m in inside.modules())
        if again or has_mixers(inside):
            raise RuntimeError(
                "token_logprobs: a backward computes layers of this model again; call it, and "
                "backward, inside of `with ringattn.hf.split_sequence(model, plans, group):`"
            )
    layout = (LayerPlans({"": plans}) if isinstance(plans, Plan) else LayerPlans(plans)).layout
    if active is not None and active.any.layout != layout:
        raise ValueError("token_logprobs: the model is inside of a split with another layout")
    around = nullcontext() if active is not None else split_sequence(model, plans, group)
    given: dict[str, Any] = {"num_items_in_batch": 1, **batch}  # of a loss that nobody looks at
    with around, scoring(inside, chunk, temperature):
        each = model(**given).log_probs
    return Gathered.apply(each, group, layout, 1) if gather else each
