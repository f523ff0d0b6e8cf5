"""Which rotary position embedding: its settings, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    factor: float | None = None
    original_length: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise ValueError(f"model.rope.type={self.type}: must be one of: {', '.join(TYPES)}")
        if self.type != "default" and self.factor is None:
            raise ValueError(
                f"model.rope.factor must be given for model.rope.type={self.type}: "
                "how many times the trained length the new one is"
            )
        if self.type == "default" and self.factor not in (None, 1):
            raise ValueError(
                f"model.rope.factor={self.factor:g} does nothing with model.rope.type=default; "
                "give linear, ntk, yarn or llama3"
            )
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
