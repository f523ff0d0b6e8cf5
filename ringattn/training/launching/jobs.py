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

# One thread a rank, also for a world of one: points are compared.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Job:
    """``process`` ends when the job does, with its exit status; ``number`` in a cluster's queue."""

    process: subprocess.Popen
    number: str = ""


@contextmanager
def torchrun(ranks: int, keys: list[str], log: Path) -> Iterator[Job]:
    """It has a session of its own: Ctrl-C reaches this process only, which then ends the job, so
    that no rank outlives it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               str(ranks), "-m", "ringattn.training", *keys]  # fmt: skip
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=_ENVIRONMENT | os.environ,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield Job(process)
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun hands it on, and kills what does not end
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@dataclass(frozen=True)
class Slurm:
    """``sbatch``: what stands after that word, options and a batch script such as
    examples/slurm.sbatch, which hands its arguments to train.py and starts ``RANKS`` processes on
    each machine; ``node_ranks``: how many that are at most. Raises SettingsError."""

    sbatch: str
    node_ranks: int

    def __post_init__(self) -> None:
        if not isinstance(self.node_ranks, int) or self.node_ranks < 1:
            raise SettingsError(
                f"hydra.launcher.node_ranks must be an integer of at least 1, got {self.node_ranks}"
            )
        try:
            shlex.split(self.sbatch)
        except (ValueError, AttributeError, TypeError) as error:
            raise SettingsError(f"hydra.launcher.sbatch={self.sbatch}: {error}") from None

    def nodes(self, ranks: int) -> int:
        """Machines for so many ranks. Raises SettingsError where they would be unequal."""
        nodes = -(-ranks // self.node_ranks)
        if ranks % nodes:
            raise SettingsError(
                f"ranks={ranks}: cannot be as many on each of {nodes} machines of "
                f"hydra.launcher.node_ranks={self.node_ranks}"
            )
        return nodes

    def queued(self, number: str) -> bool:
        """Whether a job waits or runs."""
        command = ["squeue", "--noheader", f"--jobs={number}"]
        try:
            return bool(subprocess.run(command, capture_output=True, text=True).stdout.strip())
        except FileNotFoundError:
            raise SettingsError("hydra.launcher.sbatch: no Slurm on this machine") from None

    @contextmanager
    def job(self, ranks: int, keys: list[str], log: Path) -> Iterator[Job]:
        """However often it is queued again, it is the same job. It is cancelled if it has not been
        waited for to its end."""
        nodes = self.nodes(ranks)
        name = str(log).replace("%", "%%")  # which sbatch would fill in
        command = [
            "sbatch", "--wait", "--parsable", f"--nodes={nodes}", f"--output={name}",
            *shlex.split(self.sbatch), *keys,
        ]  # fmt: skip
        environment = _ENVIRONMENT | os.environ | {"RANKS": str(ranks // nodes)}
        with log.open("w") as file:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=file, text=True, env=environment,
                start_new_session=True,
            )  # fmt: skip
        number = None
        try:
            number = process.stdout.readline().strip().split(";")[0]  # "" where it is refused
            yield Job(process, number)
        finally:
            if process.poll() is None:
                if number is None:  # interrupted amid
                    number = process.stdout.readline().strip().split(";")[0]
                if number:
                    subprocess.run(["scancel", number], check=False)
                process.terminate()  # it only waits
                process.wait()
            process.stdout.close()
