"""Real processes for tests: free ports, a limit on every wait, nothing left behind."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]

# After this a job has hung. Far above what any takes, for a slow machine is not a fault.
PATIENCE_S = 600

# The smallest run that still has grouped heads, several documents and more layers than one.
TINY = [
    "model.dim=32", "model.layers=2", "model.heads=4", "model.kv_heads=2", "model.head_dim=8",
    "model.ffn_dim=64", "seq_len=97", "data=files", "logger=none", "train.sample_tokens=0",
    "checkpoint.every=0", "optim.warmup_tokens=1000", "peak_flops=1e9",
]  # fmt: skip


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}


class Launch:
    """torchrun in a process group of its own; use as a context manager."""

    def __init__(self, world: int, script: Path, *arguments: str, restarts: int = 0) -> None:
        self.process = subprocess.Popen(
            [*TORCHRUN, str(world), f"--max-restarts={restarts}", str(script), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=_environment(),
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

    def finish(self) -> tuple[int, str]:
        """(exit status, everything printed)."""
        output, _ = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, output

    def workers(self) -> list[int]:
        """Process ids of the ranks."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]


def wait_until(condition: Callable[[], object], process: subprocess.Popen) -> None:
    """Returns once the condition holds, which ``process`` is to bring about."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, f"ended before: {process.communicate(timeout=10)[0]}"
        assert time.monotonic() < end, f"{condition} did not come"
        time.sleep(0.02)


@cache
def _zygote() -> subprocess.Popen:
    """One for this process, that forks worlds of ranks: see ``workers/zygote.py``."""
    zygote = subprocess.Popen(
        [sys.executable, ROOT / "tests/workers/zygote.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=_environment(),
        cwd="/",
    )
    atexit.register(zygote.kill)
    return zygote


def launch(world: int, *command: str | Path) -> tuple[int, str]:
    """Runs a script, or "-m" and a module, on forked ranks: (exit status, everything printed)."""
    with tempfile.NamedTemporaryFile("r", errors="replace") as out:
        job = {
            "command": [str(word) for word in command],
            "world": world,
            "environment": _environment(),
            "out": out.name,
            "seconds": PATIENCE_S,
        }
        zygote = _zygote()
        zygote.stdin.write(json.dumps(job) + "\n")
        zygote.stdin.flush()
        answer = zygote.stdout.readline()
        return json.loads(answer)["status"], out.read()


def torchrun(world: int, *command: str | Path) -> tuple[int, str]:
    """The same by torchrun, as users start it."""
    with Launch(world, *command) as job:
        return job.finish()


def train(world: int, *arguments: str) -> tuple[int, str]:
    return launch(world, ROOT / "train.py", *arguments)


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
