"""The keys of ``eval``."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from ringattn.data.settings import TASKS
from ringattn.typed import Count, Flag, OneOf, Share, Text, Whole, settings


@settings
class Eval:
    """Held-out loss and retrieval probes, with the split, engine and loss of training."""

    every: Whole = 0
    """Steps, and after the last; 0: never."""
    first: Flag = False
    """Before the first step too: what a model to start from can do."""
    sequences: Whole = 8
    """Held out, of seq_len tokens, over all ranks; 0: none."""
    holdout: Annotated[float, Field(strict=True, ge=0, le=0.5)] = 0.0
    """Share of documents that are never trained on."""
    root: Text | None = None
    """Held-out data elsewhere, read as data is."""
    probes: list[Annotated[Any, OneOf(*TASKS)]] = Field(default_factory=list)
    """passkey, recall: retrieval from any depth of a long text."""
    lengths: list[Count] | None = None
    """Of probes, in tokens; null: [seq_len]."""
    depths: list[Share] = Field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    """Of probes: where in the text what is asked for stands, from 0 to 1."""
    samples: Count = 8
    """Of probes, for every length and depth."""

    @model_validator(mode="after")
    def _has_cells(self) -> Eval:
        if self.first and not self.every:
            raise ValueError("eval.first=true: without eval.every nothing is evaluated")
        for key in ("lengths", "depths"):
            if self.probes and getattr(self, key) == []:
                raise ValueError(f"eval.{key}=[]: eval.probes={self.probes} needs some")
        return self
