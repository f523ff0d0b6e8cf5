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
    ``[batch, tokens, dim]`` is what q, k and v are made of, ``along`` the ``blocks`` of the
    sequence, the ``group`` that it is split over and the ``kernel``."""

    def __init__(self, config: ModelConfig, sets: KeySets) -> None:
        super().__init__()
        self.sets = sets
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
        sets, blocks = self.sets, along["blocks"]
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
            return mixers.adaptive_span(q, k, v, self.spans, ramp=sets.ramp, **options)
        numbers = torch.Generator().manual_seed(sets.seed)
        if sets.mixer == "hashed":
            shape = (sets.rounds, q.shape[3], sets.buckets // 2)
            rotations = torch.randn(shape, generator=numbers).to(q.device)
            # Queries and keys of one token meet: by their sum, as neither decides alone.
            wide = q.shape[2] // k.shape[2]
            both = (q + k.repeat_interleave(wide, 2)).detach().float()
            return mixers.hashed(q, k, v, mixers.lsh(both, rotations), itself=True, **options)
        return self._scatterbrain(q, k, v, numbers, options)

    def _scatterbrain(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, numbers: torch.Generator,
        options: dict[str, Any],
    ) -> torch.Tensor:  # fmt: skip
        dim = q.shape[3]
        shape = (self.sets.features, dim)
        projection = torch.randn(shape, generator=numbers).to(q.device)
        factor = math.sqrt(dim**-0.5 if options["scale"] is None else options["scale"])
        k_all = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
        with torch.autocast(q.device.type, enabled=False):
            maps = (features.performer(y.float() * factor, projection) for y in (q, k_all))
            return mixers.scatterbrain(q, k, v, *maps, **options)


def initial_span(config: ModelConfig, name: str, shape: torch.Size) -> torch.Tensor:
    """Of every head of the layer of this name: the window of its kind."""
    layer = int(name.split("layers.")[1].split(".")[0])
    sets = config.sets_of(config.kinds[layer])
    return torch.full(shape, float(sets.window))
