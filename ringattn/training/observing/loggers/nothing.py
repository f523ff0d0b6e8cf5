"""No logger: metrics.jsonl only."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from ringattn.typed import Text, settings


@settings
class Nothing:
    """metrics.jsonl only. The other keys are wandb's, so that switching it off needs no other
    change."""

    name: Literal["none"] = "none"
    """wandb, or none."""
    mode: Literal["offline", "online"] = "offline"
    """Of wandb."""
    project: Text = "ringattn"
    """Of wandb."""
    group: Text | None = None
    """Of wandb."""

    def check(self) -> None:
        """Nothing can be wrong with it."""

    def open(self, run_dir: Path, config: dict[str, Any]) -> None:
        return None
