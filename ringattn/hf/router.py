"""The router loss of a mixture of experts over all tokens of the split sequences.

It is no sum over tokens: the share of tokens that an expert gets times its mean probability (Fedus
et al. 2021, "Switch Transformers", equations 4 to 6). transformers computes it from the tokens that
it sees. Both factors are means, so they are taken over all ranks here, and the loss is made of
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ringattn.execution.carriers import Comm
from ringattn.hf.agree import total
from ringattn.hf.coverage import NotCovered, router_weight

_AGREES = 1e-3  # relative: between transformers' loss of the local tokens and ours


def over_all_tokens(
    model: nn.Module, out: Any, logits: Sequence[torch.Tensor] | None, comm: Comm
) -> None:
    """Puts this rank's share of the router loss of all ranks' tokens into ``out.aux_loss``, and
    into ``out.loss``: summed over the ranks these then have it once, in value and in gradient.
    ``logits``: of every layer's router, as the body of the model gave them. Collective.

    Raises NotCovered for a router loss of another form than transformers' usual one.
    """
    aux, name = out.aux_loss, type(model).__name__
    logits = getattr(out, "router_logits", None) if logits is None else logits
    if not isinstance(logits, (tuple, list)) or not all(x.dim() == 2 for x in logits):
        raise NotCovered(f"{name} gives a router loss without the router_logits that it is made of")
    top = top_of(model, logits, aux)
    (agreed,) = total(comm, torch.tensor([float(top is not None)]))
    if agreed < comm.world:
        raise NotCovered(
            f"{name} has a router loss of its own form; set output_router_logits=False"
        )
    share = shared_loss(logits, top, comm)
    if out.loss is not None:
        weight = router_weight(model)
        text = out.loss - weight * aux.to(out.loss.device)
        out.loss = text + weight * share.to(text)
    out.aux_loss = share


def shared_loss(logits: Sequence[torch.Tensor], top: int, comm: Comm) -> torch.Tensor:
    """This rank's share of the router loss of all ranks' tokens: the shares add up to it, in value
    and in gradient. ``logits``: of every layer, ``[local tokens, experts]``; ``top``
    experts a token. Collective."""
    counts, probabilities, rows = _statistics(logits, top)
    local = torch.cat([counts, probabilities.detach(), rows])
    everyone = total(comm, local.double()).to(local)
    experts = len(counts)
    counts, rows = everyone[:experts], everyone[-1]
    # The value of all ranks, the gradient of this rank's part of it.
    others = everyone[experts : 2 * experts] - probabilities.detach()
    whole = experts * (counts / rows * (probabilities + others) / rows).sum()
    return whole - whole.detach() * (1 - 1 / comm.world)


def top_of(model: nn.Module, logits: Sequence[torch.Tensor], aux: torch.Tensor) -> int | None:
    """How many experts a token goes to, if ``aux`` is the usual loss of these router logits."""
    return next((k for k in _choices(model) if _usual(logits, k, aux)), None)


def _choices(model: nn.Module) -> list[int]:
    """Numbers of experts that a token may go to, as models call them."""
    wheres = (model, model.config, model.config.get_text_config())
    names = ("num_experts_per_tok", "top_k", "num_experts_per_token", "moe_topk", "moe_k")
    values = [getattr(where, name, None) for where in wheres for name in names]
    return list(dict.fromkeys(value for value in values if isinstance(value, int)))


def _statistics(
    logits: Sequence[torch.Tensor], top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of all layers: tokens that each expert gets ``[experts]``, its probabilities summed, and the
    number of tokens ``[1]``; logits ``[tokens, experts]`` of each layer, float32."""
    experts = logits[0].shape[-1]
    counts = logits[0].new_zeros(experts, dtype=torch.float32)
    probabilities, rows = counts.clone(), counts.new_zeros(1)
    for each in logits:
        weights = each.to(counts.device).softmax(-1)
        chosen = weights.topk(top, -1).indices.flatten()
        counts = counts + torch.bincount(chosen, minlength=experts).to(counts)
        probabilities = probabilities + weights.float().sum(0)
        rows = rows + len(each)
    return counts, probabilities, rows


def _usual(logits: Sequence[torch.Tensor], top: int, aux: torch.Tensor) -> bool:
    """Whether transformers' loss of the local tokens is the usual one with ``top`` experts a
    token."""
    with torch.no_grad():
        counts, probabilities, rows = _statistics(logits, top)
        want = len(counts) * (counts / rows * probabilities / rows).sum()
    return bool((want - aux).abs() <= _AGREES * want.abs())
