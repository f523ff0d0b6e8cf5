"""Feature maps: softmax attention approximated by linear attention, ``exp(q . k)`` by a product of
features. Apply to q and k (each divided by the fourth root of dk for the usual scale), then
:func:`ringattn.mixers.linear` with ``normalize`` and ``scale=1``."""

from __future__ import annotations

import torch


def performer(x: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """Positive random features (Choromanski et al. 2021, arXiv:2009.14794): ``exp(w x - |x|^2 /
    2) / sqrt(features)``, whose product is ``exp(q . k)`` on the mean. x ``[..., dk]``, projection
    ``[features, dk]``, normal, the same on all ranks. Returns ``[..., features]``, positive."""
    half = x.square().sum(-1, keepdim=True) / 2
    return (x @ projection.mT - half).exp() / projection.shape[0] ** 0.5


def random_fourier(x: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """By ``projection``: Random Feature Attention (Peng et al. 2021, arXiv:2103.02143): ``exp(|x|^2
    / 2) [sin w x, cos w x] / sqrt(features)``, whose product is ``exp(q . k)`` on the mean. As in
    :func:`performer`; returns ``[..., 2 * features]``."""
    angle = x @ projection.mT
    size = (x.square().sum(-1, keepdim=True) / 2).exp()
    return size * torch.cat([angle.sin(), angle.cos()], -1) / projection.shape[0] ** 0.5
