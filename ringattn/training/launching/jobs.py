"""The job of a sweep's point: torchrun on this machine, or a batch job of Slurm."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ringattn.typed import SettingsError


@contextmanager
def torchrun(ranks: int, keys: list[str], log: Path) -> Iterator[subprocess.Popen]:
    """Its exit status is the run's. It has a session of its own: Ctrl-C reaches this process only,
    which then ends the job, so that no rank outlives it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               str(ranks), "-m", "ringattn.training", *keys]  # fmt: skip
    # One thread a rank, also for a world of one: points are compared.
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    with log.open("w") as file:
        job = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        yield job
    finally:
        if job.poll() is None:
            job.terminate()  # torchrun hands it on, and kills what does not end
            try:
                job.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(job.pid, signal.SIGKILL)
                job.wait()


@dataclass(frozen=True)
class Slurm:
    """``sbatch``: what stands after that word, options and a batch script such as
    examples/slurm.sbatch, which hands its arguments to train.py and starts ``RANKS`` processes on
    each machine; ``node_ranks``: how many that are at most."""

    sbatch: str
    node_ranks: int

    def __post_init__(self) -> None:
        if not isinstance(self.node_ranks, int) or self.node_ranks < 1:
            raise SettingsError(
                f"hydra.launcher.node_ranks must be an integer of at least 1, got {self.node_ranks}"
            )

    def nodes(self, ranks: int) -> int:
        """Machines for so many ranks. Raises SettingsError where they would be unequal."""
        nodes = -(-ranks // self.node_ranks)
        if ranks % nodes:
            raise SettingsError(
                f"ranks={ranks}: cannot be as many on each of {nodes} machines of "
                f"hydra.launcher.node_ranks={self.node_ranks}"
            )
        return nodes

    @contextmanager
    def job(self, ranks: int, keys: list[str], log: Path) -> Iterator[subprocess.Popen]:
        """A process that ends when the job does, with its exit status, however often that has been
        queued again. The job is cancelled if it is not waited for to its end."""
        nodes = self.nodes(ranks)
        command = [
            "sbatch", "--wait", "--parsable", f"--nodes={nodes}", f"--output={log}",
            f"--export=ALL,RANKS={ranks // nodes}", *shlex.split(self.sbatch), *keys,
        ]  # fmt: skip
        log.write_text("")
        try:
            waiting = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log.open("a"), text=True,
                start_new_session=True,
            )  # fmt: skip
        except FileNotFoundError:
            raise SettingsError(
                "hydra.launcher.sbatch: there is no sbatch on this machine"
            ) from None
        number = waiting.stdout.readline().strip().split(";")[0]  # "" where it is refused
        try:
            yield waiting
        finally:
            if waiting.poll() is None:
                subprocess.run(["scancel", number], check=False)
                waiting.wait()
            waiting.stdout.close()
