"""The keys of ``checkpoint``."""

from __future__ import annotations

from ringattn.typed import Count, Flag, Text, Whole, settings


@settings
class Checkpoint:
    """What is written to go on from."""

    every: Whole | None = 200
    """Steps; 0: only at the end; null: none at all."""
    keep: Count | None = 3
    """Finished ones that stay; null: all."""
    background: Flag = True
    """Written while training goes on."""
    resume: Text = "auto"
    """auto, never, or the path of a checkpoint or a run."""
