"""The optimizer's keys, and the learning rate of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from ringattn.typed import Number, Share, Whole, Words, settings

Beta = Annotated[float, Field(strict=True, ge=0, lt=1)]


@settings
class Optimizer:
    """AdamW; only matrices decay. Warm-up and cosine count tokens, whatever the split."""

    lr: Number = 3e-3
    """Learning rate after the warm-up."""
    min_lr_ratio: Share = 0.1
    """The cosine ends at this share of lr."""
    warmup_tokens: Whole = 50_000
    """Tokens over which lr grows from 0."""
    weight_decay: Number = 0.1
    """Of matrices."""
    betas: Annotated[
        list[Beta],
        Field(min_length=2, max_length=2),
        Words("two numbers of at least 0 and below 1"),
    ] = Field(default_factory=lambda: [0.9, 0.95])
    """Of AdamW's two moments."""
    clip: Number = 1.0
    """Of the global gradient norm; 0: off."""


@dataclass(frozen=True)
class Schedule:
    """The learning rate over a run: linear warm-up, then a cosine to ``min_lr_ratio * lr``, both in
    tokens."""

    lr: float
    min_lr_ratio: float
    warmup_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, keys: Optimizer, total_tokens: int) -> Schedule:
        return cls(keys.lr, keys.min_lr_ratio, keys.warmup_tokens, total_tokens)

    def rate(self, tokens_seen: int) -> float:
        """Of the step after so many tokens."""
        if tokens_seen < self.warmup_tokens:
            return self.lr * (tokens_seen + 1) / self.warmup_tokens
        rest = max(1, self.total_tokens - self.warmup_tokens)
        fallen = min(1, (tokens_seen - self.warmup_tokens) / rest)
        left = (1 + math.cos(math.pi * fallen)) / 2
        return self.lr * (self.min_lr_ratio + (1 - self.min_lr_ratio) * left)

    def __str__(self) -> str:
        return (
            f"{self.lr:g} after {self.warmup_tokens:,} tokens, {self.lr * self.min_lr_ratio:g} "
            f"after {self.total_tokens:,}"
        )
