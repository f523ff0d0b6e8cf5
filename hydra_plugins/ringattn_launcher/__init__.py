"""Hydra's way to ringattn's launcher: it looks for plugins in packages of this name only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.plugins.launcher import Launcher


class TorchrunLauncher(Launcher):
    """A torchrun job for every point of a sweep: ``ringattn.training.launching.sweep``. The keys
    of ``hydra.launcher`` are those of ``ringattn.training.launching.jobs.Slurm``; without
    ``sbatch``, jobs run on this machine."""

    def __init__(self, sbatch: str | None = None, node_ranks: int = 8) -> None:
        self.sbatch, self.node_ranks = sbatch, node_ranks

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[Any]:
        # Here: hydra imports plugins at every start.
        from ringattn.training.launching.jobs import Slurm
        from ringattn.training.launching.sweep import launch

        cluster = Slurm(self.sbatch, self.node_ranks) if self.sbatch else None
        return launch([list(overrides) for overrides in job_overrides], self.config, cluster)
