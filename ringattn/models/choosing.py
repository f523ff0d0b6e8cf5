"""Layers of our decoder that attend sets of keys which are chosen or summarised: what they need
beside attention's own weights, and their call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ringattn import mixers
from ringattn.mixers import features
from ringattn.models.key_sets import KeySets
from ringattn.models.sizes import ModelConfig


class Choosing(nn.Module):
    """``forward(x, q, k, v, along, scale)``: what attention of q over its sets of keys gives; x
    ``[batch, tokens, dim]`` is what q, k and v are made of, ``along`` the ``sets`` (those of the
    layer, or the smallest of their kind in a self-check) and ``blocks`` of the sequence, the
    ``group`` that it is split over and the ``kernel``. ``number``: of the layer."""

    def __init__(self, config: ModelConfig, sets: KeySets, number: int = 0) -> None:
        super().__init__()
        self.number = number
        dim, heads = config.dim, config.heads
        if sets.mixer == "nsa":
            self.gate_proj = nn.Linear(dim, 3 * heads, bias=False)
        elif sets.mixer == "adaptive_span":
            self.spans = nn.Parameter(torch.empty(heads))
        elif sets.learns:
            self.pool_proj = nn.Linear(dim, config.kv_heads, bias=False)

    def forward(
        self, x: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        along: Mapping[str, Any], scale: float | None = None,
    ) -> torch.Tensor:  # fmt: skip
        sets, blocks = along["sets"], along["blocks"]
        options = {"group": along["group"], "kernel": along["kernel"], "scale": scale}
        if sets.mixer == "pooled":
            levels = sets.levels_of(blocks)
            how, weights = sets.how, None
            if sets.learns:
                how, weights = "softmax", self.pool_proj(x)[..., None].float()
            return mixers.pooled(
                q, k, v, blocks=levels, near=sets.near, how=how, weights=weights, **options
            )
        options["blocks"] = blocks
        if sets.mixer == "moba":
            return mixers.moba(q, k, v, top_k=sets.top_k, **options)
        if sets.mixer == "nsa":
            gates = self.gate_proj(x).unflatten(-1, (-1, 3)).sigmoid()
            return mixers.nsa(q, k, v, gates, top_k=sets.top_k, window=sets.window, **options)
        if sets.mixer == "adaptive_span":
            spans = sets.window * self.spans.float().clamp(0, 1)
            return mixers.adaptive_span(q, k, v, spans, ramp=sets.ramp, **options)
        numbers = torch.Generator().manual_seed(1_000_003 * sets.seed + self.number)
        if sets.mixer == "hashed":
            if sets.buckets == 1:
                buckets = torch.zeros(*q.shape[:3], sets.rounds, dtype=torch.int64, device=q.device)
                return mixers.hashed(q, k, v, buckets, itself=True, **options)
            shape = (sets.rounds, q.shape[3], sets.buckets // 2)
            rotations = torch.randn(shape, generator=numbers).to(q.device)
            # Queries and keys of one token meet: by their sum, as neither decides alone.
            wide = q.shape[2] // k.shape[2]
            both = (q + k.repeat_interleave(wide, 2)).detach().float()
            return mixers.hashed(q, k, v, mixers.lsh(both, rotations), itself=True, **options)
        return self._scatterbrain(q, k, v, sets.features, numbers, options)

    def _scatterbrain(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, count: int,
        numbers: torch.Generator, options: dict[str, Any],
    ) -> torch.Tensor:  # fmt: skip
        dim = q.shape[3]
        projection = torch.randn(count, dim, generator=numbers).to(q.device)
        factor = math.sqrt(dim**-0.5 if options["scale"] is None else options["scale"])
        k_all = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
        with torch.autocast(q.device.type, enabled=False):
            maps = (features.performer(y.float() * factor, projection) for y in (q, k_all))
            return mixers.scatterbrain(q, k, v, *maps, **options)
