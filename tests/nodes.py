"""Two machines on one: network namespaces, joined by a link that can be slowed and cut.

Needs root and iproute2; what needs them is skipped, visibly, where they are not.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

from .processes import PATIENCE_S

_numbers = itertools.count()
PORT = 29500  # of a namespace of its own: always free


def missing() -> str:
    """Why there can be no second node here; empty if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program in ("ip", "tc", "unshare"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    name = f"ra-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespaces: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


# For a torchrun that meets others which have been there before: they would wait for each other's
# store for ever (torch 2.13).
ANEW = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


class Nodes:
    """Use as a context manager. ``hosts[i]`` is the address of node i."""

    def __init__(self) -> None:
        number = f"{os.getpid() % 100000}{next(_numbers)}"
        self.names = [f"ra{number}n{i}" for i in (0, 1)]
        self.links = [f"ra{number}l{i}" for i in (0, 1)]
        self.hosts = ["10.77.0.1", "10.77.0.2"]
        self.jobs: list[subprocess.Popen] = []

    def __enter__(self) -> Nodes:
        try:
            for name in self.names:
                _run("ip", "netns", "add", name)
            a, b = self.links
            _run("ip", "link", "add", a, "netns", self.names[0], "type", "veth", "peer", "name", b,
                 "netns", self.names[1])  # fmt: skip
            for name, link, host in zip(self.names, self.links, self.hosts, strict=True):
                _run("ip", "-n", name, "addr", "add", f"{host}/24", "dev", link)
                for each in (link, "lo"):
                    _run("ip", "-n", name, "link", "set", each, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for job in self.jobs:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
                job.wait()
            job.stdout.close()
        for name in self.names:
            for pid in subprocess.run(
                ["ip", "netns", "pids", name], capture_output=True, text=True
            ).stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def limit(self, mbit: float | None) -> None:
        """Both directions of the link; None: as fast as it is."""
        for name, link in zip(self.names, self.links, strict=True):
            subprocess.run(
                ["tc", "-n", name, "qdisc", "del", "dev", link, "root"], capture_output=True
            )
            if mbit is not None:
                _run("tc", "-n", name, "qdisc", "add", "dev", link, "root", "tbf", "rate",
                     f"{mbit}mbit", "burst", "256kb", "latency", "400ms")  # fmt: skip

    def cut(self, cut: bool = True) -> None:
        _run("ip", "-n", self.names[0], "link", "set", self.links[0], "down" if cut else "up")

    def ranks(self) -> list[int]:
        """Process ids of train.py on both nodes."""
        found = []
        for name in self.names:
            listing = subprocess.run(
                ["ip", "netns", "pids", name], capture_output=True, text=True, check=True
            )
            for pid in listing.stdout.split():
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                if b"train.py" in command and b"torch.distributed.run" not in command:
                    found.append(int(pid))
        return found

    def start(
        self, node: int, command: list[str], environment: dict[str, str] | None = None,
        hidden: Path | None = None, cwd: Path | None = None, core: int | None = None,
    ) -> subprocess.Popen:  # fmt: skip
        """A process on a node, which sees nothing of ``hidden`` that others write there, and runs
        on one ``core`` only if that is given."""
        line = ["ip", "netns", "exec", self.names[node]]
        if core is not None:
            line += ["taskset", "-c", str(core)]
        if hidden is not None:
            script = 'mount -t tmpfs none "$1" && shift && exec "$@"'
            line += ["unshare", "-m", "sh", "-c", script, "sh", str(hidden)]
        job = subprocess.Popen(
            [*line, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=cwd,
            start_new_session=True,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "GLOO_SOCKET_IFNAME":
               self.links[node], "TP_SOCKET_IFNAME": self.links[node]}
            | (environment or {}),
        )  # fmt: skip
        self.jobs.append(job)
        return job

    def torchrun(
        self, script: Path | str, *arguments: str, ranks: int = 1, c10d: bool = False,
        restarts: int = 0, hidden: Path | None = None, more: tuple[str, ...] = (),
        pinned: bool = False, only: int | None = None, environment: dict[str, str] | None = None,
    ) -> list[subprocess.Popen]:  # fmt: skip
        """One torchrun on each node, or ``only`` one's, of a script or, by name, of a module;
        ``hidden``: of the second. ``pinned``: each node has a core of its own, and no other."""
        jobs = []
        for node in (0, 1) if only is None else (only,):
            where = (
                ["--rdzv-backend=c10d", f"--rdzv-endpoint={self.hosts[0]}:{PORT}",
                 "--rdzv-id=two-nodes", f"--local-addr={self.hosts[node]}",
                 *([f"--rdzv-conf=is_host={1 - node}"])]
                if c10d
                else [f"--master-addr={self.hosts[0]}", f"--master-port={PORT}",
                      f"--node-rank={node}"]
            )  # fmt: skip
            command = [
                sys.executable, "-m", "torch.distributed.run", "--nnodes=2",
                f"--nproc-per-node={ranks}", f"--max-restarts={restarts}", *where, *more,
                *(["-m", script] if isinstance(script, str) else [str(script)]), *arguments,
            ]  # fmt: skip
            core = node if pinned else None
            jobs.append(self.start(node, command, environment, hidden if node else None, core=core))
        return jobs


def finish(jobs: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """(exit status, everything printed) of each."""
    said = [""] * len(jobs)

    def read(i: int) -> None:
        said[i] = jobs[i].communicate(timeout=PATIENCE_S)[0]

    threads = [threading.Thread(target=read, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [(job.returncode, text) for job, text in zip(jobs, said, strict=True)]


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
