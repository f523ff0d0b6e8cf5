"""A trace of some steps by torch.profiler, for Perfetto; the plan's steps are named in it."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity


class Profile:
    """Use as a context manager around training, and call ``before`` each step. Every rank writes
    ``profile/rank_N.json.gz`` of the run directory after the last of ``steps``, [first, last] or
    None."""

    def __init__(self, steps: list[int] | None, run_dir: Path, device: torch.device) -> None:
        self.steps, self.run_dir, self.device = steps, run_dir, device
        self.trace: torch.profiler.profile | None = None

    def __enter__(self) -> Profile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType
    ) -> None:
        self._finish()

    def before(self, step: int) -> None:
        """Begins or ends the trace where ``step``, which comes next, says so."""
        if self.steps is None:
            return
        if step == self.steps[0]:
            gpu = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
            self.trace = torch.profiler.profile(activities=[ProfilerActivity.CPU, *gpu])
            self.trace.start()
        elif step == self.steps[1] + 1:
            self._finish()

    def _finish(self) -> None:
        if self.trace is None:
            return
        self.trace.stop()
        folder = self.run_dir / "profile"
        folder.mkdir(exist_ok=True)
        self.trace.export_chrome_trace(str(folder / f"rank_{dist.get_rank()}.json.gz"))
        self.trace = None
