"""Rotary position embedding (Su et al. 2021), halves rotated as in Llama's Hugging Face weights,
with the scalings that stretch a trained context: linear, NTK-aware, YaRN, Llama 3.
"""

from __future__ import annotations

import math

import torch

from ringattn.models.rope_config import RopeConfig


def frequencies(config: RopeConfig, head_dim: int) -> torch.Tensor:
    """Radians per token, float64 ``[head_dim / 2]``."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    if config.type == "ntk":
        return (config.theta * config.factor ** (head_dim / max(head_dim - 2, 1))) ** -exponent
    plain = config.theta**-exponent
    if config.type == "linear":
        return plain / config.factor
    if config.type == "yarn":
        low, high = (
            head_dim * math.log(config.original_length / (turns * 2 * math.pi))
            / (2 * math.log(config.theta))
            for turns in (config.beta_fast, config.beta_slow)
        )  # fmt: skip
        low, high = max(math.floor(low), 0), min(math.ceil(high), head_dim - 1)
        ramp = torch.arange(head_dim // 2, dtype=torch.float64) - low
        stretched = (ramp / max(high - low, 0.001)).clamp(0, 1)
        return plain * (1 - stretched + stretched / config.factor)
    if config.type == "llama3":
        turns = config.original_length * plain / (2 * math.pi)
        between = config.high_freq_factor - config.low_freq_factor
        kept = ((turns - config.low_freq_factor) / between).clamp(0, 1)
        return plain * (kept + (1 - kept) / config.factor)
    return plain


def rotation(positions: torch.Tensor, head_dim: int, config: RopeConfig) -> torch.Tensor:
    """cos and sin of every phase: float32 ``[2, tokens, 1, head_dim / 2]``.

    positions: int64 ``[tokens]``, global or per document. The product of position and frequency
    is taken in float64, since float32 is off by 0.06 rad at position 1,000,000.
    """
    phases = positions.double()[:, None] * frequencies(config, head_dim).to(positions.device)
    return (torch.stack([phases.cos(), phases.sin()]) * config.amplitude)[:, :, None].float()


def rotate(x: torch.Tensor, phases: torch.Tensor) -> torch.Tensor:
    """x ``[batch, tokens, heads, head_dim]`` rotated in float32, returned in its own dtype."""
    cos, sin = phases
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
