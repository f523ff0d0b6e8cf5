"""Sweeps with real jobs: every point an end of its own, nothing run twice, nothing left behind."""

import gzip
import json
import os
import signal
import subprocess
import sys

import pytest

from ringattn.report.read import find

from .processes import PATIENCE_S, ROOT, TINY, launch, metrics, train, wait_until

TRAIN = [sys.executable, str(ROOT / "train.py")]
SWEEP = [*TINY, "seq_len=64", "train.steps=3", "checkpoint.every=null", "attention=causal",
         "ranks=2"]  # fmt: skip


def sweep(folder, text, *keys, **options):
    # A background job would ignore Ctrl-C, and so would its children.
    return subprocess.Popen(
        [*TRAIN, "--multirun", *SWEEP, text, f"hydra.sweep.dir={folder}", *keys],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}, **options,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def finish(job):
    try:
        output, _ = job.communicate(timeout=PATIENCE_S)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    return job.returncode, output


def points(folder):
    return {p.parent.name: json.loads(p.read_text()) for p in folder.glob("*/point.json")}


def alive(folder):
    """Processes whose command line names the folder."""
    found = subprocess.run(["pgrep", "-f", f'run_dir="{folder}'], capture_output=True, text=True)
    return found.stdout.split()


def test_a_sweep_survives_its_points_and_repeats_none(text, tmp_path):
    folder = tmp_path / "sweep"
    # One that runs, one that ends at the limit, one that is hopeless on paper.
    keys = ["model.layers=2", "memory.limit=0.3", "model.ffn_dim=64,90000,4000000"]
    status, output = finish(sweep(folder, text, *keys))
    assert status == 0, output
    ends = points(folder)
    assert {name: end["status"] for name, end in ends.items()} == {
        "model.ffn_dim-64": "finished",
        "model.ffn_dim-90000": "memory",
        "model.ffn_dim-4000000": "memory",
    }, output
    assert "ran out of memory" in ends["model.ffn_dim-90000"]["reason"]
    assert "not tried" in ends["model.ffn_dim-4000000"]["reason"]
    assert not (folder / "model.ffn_dim-4000000" / "log.txt").exists()
    assert (folder / "report" / "index.html").exists()
    steps = metrics(folder / "model.ffn_dim-64")
    assert len(steps) == 3
    for step in steps:
        parts = [step[f"{name}_s"] for name in ("compute", "exchange", "engine", "data")]
        assert all(part >= 0 for part in parts) and step["exchange_s"] > 0 < step["engine_s"]
        assert sum(parts) == pytest.approx(step["step_s"], rel=1e-6)
        assert step["pairs"] == 64 * 65 // 2
    facts = json.loads((folder / "model.ffn_dim-64" / "facts.json").read_text())
    assert facts["setup"]["world"] == 2 and facts["plan"]["area"] == 64 * 65 // 2
    assert facts["versions"]["torch"] and not list(folder.glob("*/checkpoints/*"))
    stamps = {p: p.stat().st_mtime_ns for p in folder.glob("*/point.json")}
    status, output = finish(sweep(folder, text, *keys))
    assert status == 0 and output.count("done before") == 3
    assert stamps == {p: p.stat().st_mtime_ns for p in folder.glob("*/point.json")}


def test_ctrl_c_leaves_nothing_behind_and_the_rest_is_done_later(text, tmp_path):
    folder = tmp_path / "sweep"
    keys = ["train.steps=3,2000"]
    job = sweep(folder, text, *keys)
    second = folder / "train.steps-2000" / "metrics.jsonl"
    wait_until(lambda: second.exists() and second.read_text().count("\n") > 2, job)
    assert alive(folder)
    status, output = finish(sweep(folder, text, *keys))
    assert status == 2 and "another sweep is at work" in output
    job.send_signal(signal.SIGINT)
    status, output = finish(job)
    assert status == 130 and "interrupted" in output
    assert not alive(folder)
    ends = points(folder)
    assert ends["train.steps-3"]["status"] == "finished"
    assert ends["train.steps-2000"]["status"] == "interrupted"
    assert [run.status for run in find([folder])] == ["finished", "interrupted"]


def test_a_sweep_with_a_mistake_starts_nothing(text, tmp_path):
    folder = tmp_path / "sweep"
    for keys, message in (
        (["parallel.cp=1,3"], "parallel.cp=3 does not divide the world of 2 ranks"),
        (["optim.lr=1,fast"], "optim.lr must be"),
        (["ranks=1,2", "parallel.cp=2"], "parallel.cp=2 does not divide the world of 1 ranks"),
        (["experiment=scaling_lengths"], "scaling_lengths"),
        (["optim.rate=1,2"], "optim.rate"),
    ):
        status, output = finish(sweep(folder, text, *keys))
        assert status == 2 and message in output, output
        assert "Traceback" not in output and not list(folder.glob("*/*"))


def test_ranks_must_be_those_of_the_launch(text, tmp_path):
    status, output = train(2, *TINY, text, f"run_dir={tmp_path / 'run'}", "ranks=4")
    assert status != 0 and "ranks=4: this run has 2; start it with --multirun" in output


def test_a_profile_names_the_steps_of_the_plan(text, tmp_path):
    folder = tmp_path / "run"
    keys = [*TINY, text, f"run_dir={folder}", "train.steps=4", "profile.steps=[2,3]"]
    status, output = launch(2, ROOT / "train.py", *keys)
    assert status == 0, output
    for rank in (0, 1):
        file = folder / "profile" / f"rank_{rank}.json.gz"
        trace = json.loads(gzip.decompress(file.read_bytes()))
        names = [event.get("name", "") for event in trace["traceEvents"]]
        # Two steps of two layers, and two steps of the ring in each.
        assert names.count("forward, step 0: block 0") == 4
        assert names.count("backward, step 1: block 1") == 4
        assert "wait for K/V, step 0" in names
