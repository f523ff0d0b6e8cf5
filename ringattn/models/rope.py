"""Rotary position embedding (Su et al. 2021), halves rotated as in Llama's Hugging Face weights,
with the scalings that stretch a trained context: linear, NTK-aware, YaRN, Llama 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

TYPES = ("default", "linear", "ntk", "yarn", "llama3")


@dataclass(frozen=True)
class RopeConfig:
    """``type`` and what it uses; the names in transformers are given where they differ.

    * default: ``theta`` alone.
    * linear: positions / ``factor`` (Chen et al. 2023).
    * ntk: theta * factor ** (d / (d - 2)), which is transformers' "dynamic" at a length of
      ``factor`` times the trained one.
    * yarn: high frequencies kept, low ones / ``factor``, in between a ramp from ``beta_fast`` to
      ``beta_slow`` rotations over ``original_length``; cos and sin times ``attention_factor``
      (null: 0.1 ln factor + 1) (Peng et al. 2023).
    * llama3: wavelengths above original_length / ``low_freq_factor`` are stretched by ``factor``,
      those below original_length / ``high_freq_factor`` kept.

    ``original_length`` (original_max_position_embeddings) is the trained length in tokens. Raises
    ValueError, naming the key, for what does not fit.
    """

    type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_length: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise ValueError(f"model.rope.type={self.type}: must be one of: {', '.join(TYPES)}")
        if self.type in ("yarn", "llama3") and self.original_length is None:
            raise ValueError(
                f"model.rope.original_length must be given for model.rope.type={self.type}: "
                "the length in tokens that the model was trained on"
            )
        if self.type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"model.rope.low_freq_factor={self.low_freq_factor} must be below "
                f"model.rope.high_freq_factor={self.high_freq_factor}"
            )

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied by."""
        if self.type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def frequencies(self, head_dim: int) -> torch.Tensor:
        """Radians per token, float64 ``[head_dim / 2]``."""
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        if self.type == "ntk":
            return (self.theta * self.factor ** (head_dim / max(head_dim - 2, 1))) ** -exponent
        plain = self.theta**-exponent
        if self.type == "linear":
            return plain / self.factor
        if self.type == "yarn":
            low, high = (
                head_dim * math.log(self.original_length / (turns * 2 * math.pi))
                / (2 * math.log(self.theta))
                for turns in (self.beta_fast, self.beta_slow)
            )  # fmt: skip
            low, high = max(math.floor(low), 0), min(math.ceil(high), head_dim - 1)
            ramp = torch.arange(head_dim // 2, dtype=torch.float64) - low
            stretched = (ramp / max(high - low, 0.001)).clamp(0, 1)
            return plain * (1 - stretched + stretched / self.factor)
        if self.type == "llama3":
            turns = self.original_length * plain / (2 * math.pi)
            between = self.high_freq_factor - self.low_freq_factor
            kept = ((turns - self.low_freq_factor) / between).clamp(0, 1)
            return plain * (kept + (1 - kept) / self.factor)
        return plain


def rotation(positions: torch.Tensor, head_dim: int, config: RopeConfig) -> torch.Tensor:
    """cos and sin of every phase: float32 ``[2, tokens, 1, head_dim / 2]``.

    positions: int64 ``[tokens]``, global or per document. The product of position and frequency
    is taken in float64, since float32 is off by 0.06 rad at position 1,000,000.
    """
    phases = positions.double()[:, None] * config.frequencies(head_dim).to(positions.device)
    return (torch.stack([phases.cos(), phases.sin()]) * config.amplitude)[:, :, None].float()


def rotate(x: torch.Tensor, phases: torch.Tensor) -> torch.Tensor:
    """x ``[batch, tokens, heads, head_dim]`` rotated in float32, returned in its own dtype."""
    cos, sin = phases
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
