"""The optimizer's keys, and the learning rate of a step."""

from __future__ import annotations

import math
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


def learning_rate(settings: Optimizer, tokens_seen: int, total_tokens: int) -> float:
    """Linear warm-up, then a cosine to ``min_lr_ratio * lr``, both in tokens."""
    if tokens_seen < settings.warmup_tokens:
        return settings.lr * (tokens_seen + 1) / settings.warmup_tokens
    rest = max(1, total_tokens - settings.warmup_tokens)
    falling = (1 + math.cos(math.pi * min(1, (tokens_seen - settings.warmup_tokens) / rest))) / 2
    return settings.lr * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * falling)
