"""Which rotary position embedding: its settings, without torch."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, Strict, model_validator

from ringattn.typed import Count, Positive, settings


@settings
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

    type: Literal["default", "linear", "ntk", "yarn", "llama3"] = "default"
    """How positions are stretched beyond the trained length."""
    theta: Annotated[float, Strict(), Field(gt=1)] = 10000.0
    """Base of the wavelengths."""
    factor: Annotated[float, Strict(), Field(ge=1)] | None = None
    """Trained length x factor is the new length (all types but default)."""
    original_length: Count | None = None
    """Tokens that the model was trained on (yarn, llama3)."""
    beta_fast: Positive = 32.0
    """Of yarn: rotations over original_length from which on a frequency is kept."""
    beta_slow: Positive = 1.0
    """Of yarn: rotations below which a frequency is stretched whole."""
    low_freq_factor: Positive = 1.0
    """Of llama3: wavelengths above original_length / this are stretched whole."""
    high_freq_factor: Positive = 4.0
    """Of llama3: wavelengths below original_length / this are kept."""
    attention_factor: Positive | None = None
    """Of yarn: what cos and sin are multiplied by; null: 0.1 ln factor + 1."""

    @model_validator(mode="after")
    def _has_what_its_type_uses(self) -> RopeConfig:
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
        return self

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied by."""
        if self.type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
