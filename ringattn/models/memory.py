"""What a rank keeps from forward to backward: the keys of ``memory``, without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ringattn.typed import Count, Flag, settings


@settings
class Memory:
    """What is kept for the backward, and what is computed again."""

    checkpoint: Flag = False
    """Compute blocks again in the backward; of each, its input and attention's result are kept."""
    offload: Flag = False
    """What is then kept waits in host memory (pinned, for a GPU)."""
    ffn_tile: Count | None = None
    """Tokens of the feed-forward at a time, each computed again in the backward; null: all at
    once."""
    loss_chunk: Count | None = None
    """Tokens of the loss at a time; null: as many as make their logits as large as the hidden
    states."""
    loss: Literal["chunked", "liger"] = "chunked"
    """Whose loss: ours, or liger-kernel's (on a GPU)."""
    limit: Annotated[float, Field(strict=True, ge=0.2)] | None = None
    """GiB that a rank may hold; more is an error, as on a smaller device. (With less than that,
    libraries wait for threads that they cannot start.)"""

    @model_validator(mode="after")
    def _offloads_what_is_kept(self) -> Memory:
        if self.offload and not self.checkpoint:
            raise ValueError("memory.offload=true needs memory.checkpoint=true")
        return self

    def tiled(self, tokens: int) -> bool:
        """Whether the feed-forward of so many tokens is computed in several tiles."""
        return self.ffn_tile is not None and self.ffn_tile < tokens
