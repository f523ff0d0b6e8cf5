"""Real processes for tests: free ports, a limit on every wait, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]

# The smallest run that still has grouped heads, several documents and more layers than one.
TINY = [
    "model.dim=32", "model.layers=2", "model.heads=4", "model.kv_heads=2", "model.head_dim=8",
    "model.ffn_dim=64", "seq_len=97", "data=files", "logger=none", "train.sample_tokens=0",
    "checkpoint.every=0", "optim.warmup_tokens=1000", "peak_flops=1e9",
]  # fmt: skip


class Launch:
    """torchrun in a process group of its own; use as a context manager."""

    def __init__(self, world: int, script: Path, *arguments: str, restarts: int = 0) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
        self.process = subprocess.Popen(
            [*TORCHRUN, str(world), f"--max-restarts={restarts}", str(script), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        # torchrun gives its workers groups of their own: they die with it, by its own doing.
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self.process.stdout.close()

    def finish(self, timeout: float = 150) -> tuple[int, str]:
        """(exit status, everything printed)."""
        output, _ = self.process.communicate(timeout=timeout)
        return self.process.returncode, output

    def workers(self) -> list[int]:
        """Process ids of the ranks."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]


def launch(world: int, script: Path, *arguments: str, timeout: float = 150) -> tuple[int, str]:
    with Launch(world, script, *arguments) as job:
        return job.finish(timeout)


def train(world: int, *arguments: str, timeout: float = 150) -> tuple[int, str]:
    return launch(world, ROOT / "train.py", *arguments, timeout=timeout)


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
