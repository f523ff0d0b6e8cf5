"""The documented batch script under a real Slurm: two tasks, preempted, queued again, whole."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .processes import PATIENCE_S, ROOT, TINY, metrics, train
from .slurm import Slurm, missing

WHY_NOT = missing()
pytestmark = [
    pytest.mark.xdist_group("slurm"),  # one cluster: those of two would number their jobs alike
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


@contextlib.contextmanager
def sweep(slurm, folder, text, *more):
    """train.py --multirun, whose points are jobs of two tasks."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    batch = f"--open-mode=append {ROOT / 'examples/slurm.sbatch'}"
    job = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "--multirun", *TINY, text, "ranks=2",
         f"hydra.launcher.sbatch={batch}", "hydra.launcher.node_ranks=1",
         f"hydra.sweep.dir={folder}", *more],
        env=slurm.environment | {"PATH": path, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline",
                                 "PORT": str(free_port())},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        yield job
    finally:
        if job.poll() is None:
            job.terminate()
            job.wait(60)
        job.stdout.close()


def jobs(slurm, *more):
    return slurm.run("squeue", "-h", "-o", "%i", *more).stdout.split()


def test_a_sweep_runs_as_jobs_of_slurm(slurm, tmp_path, text):
    """The same command as on one machine: all points in the queue at once, each its own end; one
    that is queued again is still the point's job."""
    folder = tmp_path / "sweep"
    more = ("train.steps=40", "seq_len=1500", "batch_size=4")
    with sweep(slurm, folder, text, *more, "optim.lr=0.001,fast") as job:
        output, _ = job.communicate(timeout=PATIENCE_S)
        assert job.returncode == 2 and "optim.lr must be" in output and not jobs(slurm)
    with sweep(slurm, folder, text, *more, "optim.lr=0.001,0.002") as job:
        first = folder / "optim.lr-0.001" / "metrics.jsonl"
        slurm.until(lambda: first.exists() and first.read_text().count("\n") > 5)
        assert len(jobs(slurm)) == 2
        (running,) = jobs(slurm, "--states=RUNNING")
        assert slurm.run("scontrol", "requeue", running).returncode == 0
        slurm.until(lambda: slurm.state(running) == "PENDING")
        time.sleep(3)
        slurm.run("scontrol", "update", f"JobId={running}", "StartTime=now")
        output, _ = job.communicate(timeout=PATIENCE_S)
        assert job.returncode == 0 and "2/2" in output, output
    ends = {p.parent.name: json.loads(p.read_text()) for p in folder.glob("*/point.json")}
    assert {end["status"] for end in ends.values()} == {"finished"} and len(ends) == 2, ends
    for path in folder.glob("optim.lr-*"):
        assert [m["step"] for m in metrics(path)] == list(range(1, 41))
        assert json.loads((path / "facts.json").read_text())["setup"]["world"] == 2
    assert "resumed" in (folder / "optim.lr-0.001" / "log.txt").read_text()
    assert (folder / "report" / "index.html").exists() and not jobs(slurm)


def test_a_sweep_that_is_interrupted_cancels_its_jobs(slurm, tmp_path, text):
    folder = tmp_path / "sweep"
    with sweep(slurm, folder, text, "train.steps=2000", "optim.lr=0.001,0.002") as job:
        first = folder / "optim.lr-0.001" / "metrics.jsonl"
        slurm.until(lambda: first.exists() and first.read_text().count("\n") > 2)
        job.send_signal(signal.SIGINT)
        output, _ = job.communicate(timeout=PATIENCE_S)
        assert job.returncode == 130 and "interrupted" in output, output
    slurm.until(lambda: not jobs(slurm))
    ends = [json.loads(p.read_text())["status"] for p in folder.glob("*/point.json")]
    assert ends == ["interrupted"] * 2


def test_a_sweep_whose_jobs_outlive_it_is_not_begun_twice(slurm, tmp_path, text):
    folder = tmp_path / "sweep"
    with sweep(slurm, folder, text, "train.steps=2000,2001") as job:
        first = folder / "train.steps-2000" / "metrics.jsonl"
        slurm.until(lambda: first.exists() and first.read_text().count("\n") > 2)
        job.kill()
        job.wait()
    before = first.read_text()
    with sweep(slurm, folder, text, "train.steps=2000,2001") as job:
        output, _ = job.communicate(timeout=PATIENCE_S)
        assert job.returncode == 2 and "is still in the queue" in output, output
    assert len(jobs(slurm)) == 2 and first.read_text().startswith(before)
    slurm.run("scancel", "--user=root")
    slurm.until(lambda: not jobs(slurm))
    # What has waited for them would go on asking when the cluster is gone.
    subprocess.run(["pkill", "-f", f"sbatch --wait.*{folder}"], check=False)


def test_what_slurm_refuses_is_said(slurm, tmp_path, text):
    more = ("train.steps=1,2", "hydra.launcher.sbatch=--no-such-option")
    with sweep(slurm, tmp_path / "sweep", text, *more) as job:
        output, _ = job.communicate(timeout=PATIENCE_S)
        assert job.returncode == 0 and output.count("no-such-option") == 2, output
    more = ("ranks=3,4", "hydra.launcher.node_ranks=2")
    with sweep(slurm, tmp_path / "sweep", text, *more) as job:
        output, _ = job.communicate(timeout=PATIENCE_S)
        assert job.returncode == 2 and "ranks=3: cannot be as many on each of 2" in output, output
