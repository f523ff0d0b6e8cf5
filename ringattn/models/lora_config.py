"""Which matrices get adapters of low rank: the keys of ``model.lora``, without torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ringattn.typed import Positive, Text, Whole, Words, settings


@settings
class Lora:
    """Adapters of low rank beside frozen weights (LoRA, arXiv:2106.09685), as peft has them."""

    rank: Whole = 0
    """Of the adapters (model=transformers); 0: none, and all weights are trained."""
    alpha: Positive = 16.0
    """What adapters add is multiplied by alpha / rank."""
    targets: Annotated[
        Annotated[list[Text], Field(min_length=1)] | None,
        Words("null or a list of names of linear layers, as [q_proj,v_proj]"),
    ] = None
    """The linear layers that get one, by the ends of their names; null: all but the head."""
