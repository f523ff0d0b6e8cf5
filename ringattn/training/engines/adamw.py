"""AdamW as the engines use it: its groups, and the state that checkpoints hold."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ringattn.training.engines import KINDS
from ringattn.training.optimizer import Optimizer


def make_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.AdamW:
    """AdamW of what is not frozen; only matrices decay (what is a matrix, a flat part of ZeRO 3
    does not show), and of them not Mamba-1's ``A_log``, whose rows are decays of their own.

    The learning rate is set before every step; until then it is 0, so that a step on gradients of
    0, which DeepSpeed makes to allocate, changes nothing."""
    parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            matrix = len(getattr(p, "ds_shape", p.shape)) >= 2
            parts[matrix and name.rsplit(".", 1)[-1] != "A_log"].append(p)
    groups = [
        {"params": params, "weight_decay": settings.weight_decay if decays else 0.0}
        for decays, params in parts.items()
        if params
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=tuple(settings.betas), fused=True)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are not frozen."""
    return [p for p in model.parameters() if p.requires_grad]


def allocate(optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor]) -> None:
    """Gives AdamW the state that it would make at its first step, so that it can be written."""
    for p in parameters:
        state = optimizer.state[p]
        state.setdefault("step", torch.zeros((), dtype=torch.float32, device=p.device))
        for kind in KINDS[1:]:
            state.setdefault(kind, torch.zeros_like(p))


def set_steps(optimizer: torch.optim.Optimizer, adam_steps: int) -> None:
    for state in optimizer.state.values():
        state["step"].fill_(adam_steps)
