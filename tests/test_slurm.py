"""The documented batch script under a real Slurm: two tasks, preempted, queued again, whole."""

import os
import socket
import sys
import time
from pathlib import Path

import pytest

from .processes import ROOT, TINY, metrics, train
from .slurm import Slurm, missing

WHY_NOT = missing()
pytestmark = [
    pytest.mark.skipif(bool(WHY_NOT), reason=f"no Slurm: {WHY_NOT}"),
]


@pytest.fixture(scope="module")
def slurm():
    with Slurm() as cluster:
        yield cluster


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def submit(slurm, tmp_path, *arguments):
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RANKS": "1", "PORT": str(free_port()), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return slurm.submit(
        "--nodes=2", str(ROOT / "examples/slurm.sbatch"), *arguments,
        environment=environment, output=tmp_path / "log.txt",
    )  # fmt: skip


def losses(run_dir):
    return [(m["step"], m["loss"], m["grad_norm"]) for m in metrics(run_dir)]


def keys(run_dir, text, *more):
    return [*TINY, text, f"run_dir={run_dir}", "parallel.cp=2", *more]


@pytest.mark.parametrize("how", ["preempted", "out of time"])
def test_a_job_that_is_queued_again_goes_on(slurm, tmp_path, text, how):
    more = ("train.steps=100", "seq_len=1500", "batch_size=4")
    job = submit(slurm, tmp_path, *keys(tmp_path / "run", text, *more))
    file, log = tmp_path / "run/metrics.jsonl", tmp_path / "log.txt"
    slurm.until(lambda: file.exists() and file.read_text().count("\n") > 10)
    # What Slurm does of itself for `--signal=B:USR1@180`, and for a job that it preempts.
    out_of_time = ("scancel", "--batch", "--signal=USR1", job)
    sent = slurm.run(*(out_of_time if how == "out of time" else ("scontrol", "requeue", job)))
    assert sent.returncode == 0, sent.stderr
    slurm.until(lambda: slurm.state(job) == "PENDING")
    # Slurm lets what it has queued again wait for two minutes, since within the second of its end
    # a node takes it for the job that was killed.
    time.sleep(3)
    assert slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now").returncode == 0
    slurm.until(lambda: "resumed" in log.read_text() or slurm.state(job) == "FAILED")
    assert "resumed" in log.read_text()
    assert "stopped on request" in log.read_text()
    assert slurm.wait(job) == "COMPLETED", log.read_text()
    assert train(2, *keys(tmp_path / "whole", text, *more))[0] == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
