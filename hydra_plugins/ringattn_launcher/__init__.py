"""Hydra's way to ringattn's launcher: it looks for plugins in packages of this name only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.plugins.launcher import Launcher


class TorchrunLauncher(Launcher):
    """A torchrun job for every point of a sweep: ``ringattn.training.launching.sweep``."""

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[Any]:
        from ringattn.training.launching.sweep import (
            launch,  # here: hydra imports plugins at every start
        )

        return launch([list(overrides) for overrides in job_overrides], self.config)
