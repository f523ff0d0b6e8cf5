"""Slurm on one machine: a controller and two nodes with files, sockets and ports of their own.

Needs root, munged, slurmctld and slurmd (Debian: slurmctld slurmd slurm-client munge); what needs
them is skipped, visibly, where they are not.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from .processes import PATIENCE_S

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MpiDefault=none
SwitchType=switch/none
KillWait=60
ReturnToService=2
SchedulerParameters=batch_sched_delay=1,sched_interval=2,requeue_delay=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no Slurm here; empty if there can."""
    if os.geteuid() != 0:
        return "a Slurm of one's own needs root"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"{', '.join(absent)} not installed" if absent else ""


class Slurm:
    """Use as a context manager. Nothing of it is below a test's folder: sockets want short paths,
    and munge folders that only root may write to."""

    def __enter__(self) -> Slurm:
        self.folder = Path(tempfile.mkdtemp(prefix="ra-slurm-", dir="/run"))
        self.folder.chmod(0o755)
        self.daemons: list[subprocess.Popen] = []
        with contextlib.ExitStack() as free:
            probes = [free.enter_context(socket.socket()) for _ in range(3)]
            for probe in probes:
                probe.bind(("127.0.0.1", 0))
            ports = [probe.getsockname()[1] for probe in probes]
        conf = self.folder / "slurm.conf"
        conf.write_text(
            CONF.format(host=socket.gethostname().split(".")[0], folder=self.folder, ports=ports)
        )
        for name in ("state", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(256))
        key.chmod(0o400)
        self.environment = os.environ | {"SLURM_CONF": str(conf)}
        try:
            files = {"key": "key", "socket": "sock", "pid": "pid", "log": "log", "seed": "seed"}
            self._daemon(
                "munged", "--foreground",
                *(f"--{k}-file={self.folder}/munge.{v}" for k, v in files.items() if k != "socket"),
                f"--socket={self.folder}/munge.sock",
            )  # fmt: skip
            self.until(lambda: (self.folder / "munge.sock").exists())
            self._daemon("slurmctld", "-D", "-c", "-i")
            self.until(lambda: self.run("scontrol", "ping").returncode == 0)
            for node in ("n1", "n2"):
                self._daemon("slurmd", "-D", "-N", node)
            self.until(lambda: self.run("sinfo", "-h", "-o", "%D %t").stdout.strip() == "2 idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.run("scancel", "--user=root", "--signal=KILL", "--full")
            self.run("scancel", "--user=root")
            end = time.monotonic() + 30
            while self.run("squeue", "-h").stdout and time.monotonic() < end:
                time.sleep(0.3)  # whose steps would outlive the daemons
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in reversed(self.daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60
        )

    def submit(self, *command: str, environment: dict[str, str], output: Path) -> str:
        """The number of the job."""
        names = ",".join(["ALL", *(f"{k}={v}" for k, v in environment.items())])
        made = self.run("sbatch", "--parsable", f"--export={names}", f"--output={output}", *command)
        assert made.returncode == 0, made.stderr
        return made.stdout.strip()

    def state(self, job: str) -> str:
        shown = self.run("scontrol", "show", "job", job).stdout
        return next((w[9:] for w in shown.split() if w.startswith("JobState=")), "")

    def wait(self, job: str) -> str:
        """Its last state."""
        self.until(lambda: self.state(job) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"))
        return self.state(job)

    def _daemon(self, *command: str) -> None:
        with (self.folder / "daemons.log").open("a") as log:
            self.daemons.append(
                subprocess.Popen(
                    command, env=self.environment, stdout=log, stderr=log, start_new_session=True
                )
            )

    def until(self, condition) -> None:
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end, (self.folder / "daemons.log").read_text()
            time.sleep(0.3)
