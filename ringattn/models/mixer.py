"""Layers of our decoder that carry a state along the sequence in place of attention.

What they share is as in gated DeltaNet (arXiv:2412.06464): q, k and v through a short convolution,
the recurrence, a norm over each head, a gate. Kinds differ in decay and rule, and keep the form of
their source in that: RetNet (arXiv:2307.08621), Mamba-2 (arXiv:2405.21060), GLA (arXiv:2312.06635),
Kimi Linear (arXiv:2510.26692). All heads have q, k and v of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from ringattn import mixers
from ringattn.models.mixer_config import DELTA, LOW_RANK, Mixer
from ringattn.models.sizes import ModelConfig

_TAU = 16  # of GLA's decay


class Recurrent(nn.Module):
    """``forward(x, along)``: x ``[batch, tokens, dim]`` of this rank; ``along``: the ``segments``
    of the sequence and the ``group`` that it is split over."""

    def __init__(self, config: ModelConfig, kind: Mixer) -> None:
        super().__init__()
        self.kind, dim, heads = kind, config.dim, kind.heads
        keys, values = heads * kind.key_dim, heads * kind.value_dim
        self.q_proj, self.k_proj = (nn.Linear(dim, keys, bias=False) for _ in range(2))
        self.v_proj = nn.Linear(dim, values, bias=False)
        if kind.conv > 1:
            self.conv_weight = nn.Parameter(torch.empty(kind.channels, kind.conv))
        if kind.mixer in ("ssd", "gated_delta"):
            self.dt_proj = nn.Linear(dim, heads, bias=False)
            self.A_log, self.dt_bias = (nn.Parameter(torch.empty(heads)) for _ in range(2))
        if kind.mixer == "ssd":
            self.D = nn.Parameter(torch.empty(heads))
        if kind.decays_vectors:
            self.decay_in = nn.Linear(dim, LOW_RANK, bias=False)
            self.decay_out = nn.Linear(LOW_RANK, keys, bias=False)
            self.dt_bias = nn.Parameter(torch.empty(keys))
        if kind.mixer == "kda":
            self.A_log = nn.Parameter(torch.empty(heads))
        if kind.mixer in DELTA:
            self.beta_proj = nn.Linear(dim, heads, bias=False)
        self.gate_proj = nn.Linear(dim, values, bias=False)
        self.out_norm = nn.RMSNorm(kind.value_dim, config.norm_eps)
        self.o_proj = nn.Linear(values, dim, bias=False)

    def forward(self, x: torch.Tensor, along: Mapping[str, Any]) -> torch.Tensor:
        kind = self.kind
        qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)
        if kind.conv > 1:
            qkv = F.silu(mixers.conv(qkv, self.conv_weight, **along))
        keys = kind.heads * kind.key_dim
        q, k, v = (
            rearrange(part, "b t (h d) -> b t h d", h=kind.heads)
            for part in qkv.split([keys, keys, kind.heads * kind.value_dim], -1)
        )
        gate = rearrange(self.gate_proj(x), "b t (h d) -> b t h d", h=kind.heads)
        out = self._mixed(x, q, k, v, along)
        out = self.out_norm(out) * F.silu(gate)
        return self.o_proj(rearrange(out, "b t h d -> b t (h d)"))

    def _mixed(
        self, x: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        along: Mapping[str, Any],
    ) -> torch.Tensor:  # fmt: skip
        """The recurrence, ``[batch, tokens, heads, value_dim]``."""
        name = self.kind.mixer
        if name == "linear":
            q, k = (F.elu(y.float()) + 1 for y in (q, k))
            return mixers.linear(q, k, v, normalize=True, **along)
        if name == "lightning":
            # RetNet's: 1 - 2^-5 to 1 - 2^-9, in even steps of the logarithm.
            slopes = torch.linspace(-5, -9, self.kind.heads, device=x.device) * math.log(2)
            return mixers.linear(q, k, v, torch.log1p(-slopes.exp()), **along)
        if name == "ssd":
            step = F.softplus(self.dt_proj(x).float() + self.dt_bias.float())
            decay = -self.A_log.float().exp() * step
            out = mixers.linear(q, k, v * step[..., None].to(v.dtype), decay, **along)
            return out + self.D[:, None] * v
        if name == "gla":
            return mixers.linear(q, k, v, F.logsigmoid(self._low_rank(x)) / _TAU, **along)
        q, k = (F.normalize(y.float(), dim=-1) for y in (q, k))
        beta = self.beta_proj(x).float().sigmoid()
        decay = None
        if name == "gated_delta":
            step = F.softplus(self.dt_proj(x).float() + self.dt_bias.float())
            decay = -self.A_log.float().exp() * step
        elif name == "kda":
            decay = -self.A_log.float().exp()[:, None] * F.softplus(self._low_rank(x))
        return mixers.delta(q, k, v, beta, decay, **along)

    def _low_rank(self, x: torch.Tensor) -> torch.Tensor:
        """What makes a decay for each of key_dim, ``[batch, tokens, heads, key_dim]``, float32."""
        logits = self.decay_out(self.decay_in(x)).float() + self.dt_bias.float()
        return rearrange(logits, "b t (h d) -> b t h d", h=self.kind.heads)


class GatedConv(nn.Module):
    """LFM2's (arXiv:2511.23404): a short convolution between two gates. As :class:`Recurrent`."""

    def __init__(self, config: ModelConfig, kind: Mixer) -> None:
        super().__init__()
        self.in_proj = nn.Linear(config.dim, 3 * kind.channels, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(kind.channels, kind.conv))
        self.o_proj = nn.Linear(kind.channels, config.dim, bias=False)

    def forward(self, x: torch.Tensor, along: Mapping[str, Any]) -> torch.Tensor:
        before, after, inner = self.in_proj(x).chunk(3, -1)
        return self.o_proj(after * mixers.conv(before * inner, self.conv_weight, **along))


class Selective(nn.Module):
    """Mamba-1's (arXiv:2312.00752): a state of ``key_dim`` for each channel by itself, whose decay
    and inputs are made of the convolved channels. As :class:`Recurrent`."""

    def __init__(self, config: ModelConfig, kind: Mixer) -> None:
        super().__init__()
        self.kind, dim, values = kind, config.dim, kind.heads * kind.value_dim
        self.v_proj, self.gate_proj = (nn.Linear(dim, values, bias=False) for _ in range(2))
        if kind.conv > 1:
            self.conv_weight = nn.Parameter(torch.empty(values, kind.conv))
        self.bc_proj = nn.Linear(values, LOW_RANK + 2 * kind.key_dim, bias=False)
        self.dt_proj = nn.Linear(LOW_RANK, values, bias=False)
        self.dt_bias, self.D = (nn.Parameter(torch.empty(values)) for _ in range(2))
        self.A_log = nn.Parameter(torch.empty(values, kind.key_dim))
        self.o_proj = nn.Linear(values, dim, bias=False)

    def forward(self, x: torch.Tensor, along: Mapping[str, Any]) -> torch.Tensor:
        v, keys = self.v_proj(x), self.kind.key_dim
        if self.kind.conv > 1:
            v = F.silu(mixers.conv(v, self.conv_weight, **along))
        low, B, C = self.bc_proj(v).split([LOW_RANK, keys, keys], -1)
        step = F.softplus(self.dt_proj(low).float() + self.dt_bias.float())
        out = mixers.scan(v, step, -self.A_log.float().exp(), B, C, **along) + self.D * v
        return self.o_proj(out * F.silu(self.gate_proj(x)))


def make_mixer(config: ModelConfig, kind: Mixer) -> nn.Module:
    """The module of a kind whose sizes are all known."""
    of = {"conv": GatedConv, "scan": Selective}
    return of.get(kind.mixer, Recurrent)(config, kind)


def initial_mixer_weight(
    name: str, shape: torch.Size, generator: torch.Generator
) -> torch.Tensor | None:
    """As :func:`ringattn.models.decoder.initial_weight`, of what is neither a projection nor a
    norm; else None. As in Mamba-2: decays of 1 to 16 a step, steps of 0.001 to 0.1, both spread
    evenly (steps in their logarithm); GLA's and Kimi's biases alike. In Mamba-1 the decays of a
    channel's state are 1, 2, ..."""
    last = name.rsplit(".", 1)[-1]
    uniform = torch.rand(shape, generator=generator)
    if last == "A_log" and len(shape) == 2:
        return torch.arange(1.0, 1 + shape[1]).log().expand(shape).clone()
    if last == "A_log":
        return (1 + 15 * uniform).log()
    if last == "dt_bias":
        step = torch.exp(uniform * math.log(100) + math.log(0.001))
        return step + torch.log(-torch.expm1(-step))  # softplus's inverse
    if last == "D":
        return torch.ones(shape)
    if last == "conv_weight":  # torch's own of a convolution
        return (2 * uniform - 1) * shape[-1] ** -0.5
    return None
