"""Attention and training across real processes."""

import json
import os
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest

from .processes import ROOT, TINY, Launch, launch, metrics, train


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ring_attention_on_processes(world):
    status, output = launch(world, ROOT / "tests/workers/ring.py")
    assert status == 0, output


def test_same_losses_for_every_split_stage_and_accumulation(tmp_path, text):
    """Six sequences a step throughout; unequal documents leave ranks unequally supervised."""

    def case(world, name, cp, batch, accum, stage, *more):
        run_dir = tmp_path / f"world{world}-{name}"
        keys = [
            f"parallel.cp={cp}", f"batch_size={batch}", f"train.grad_accum={accum}",
            f"engine.zero_stage={stage}", f"run_dir={run_dir}", "train.steps=3", *more,
        ]  # fmt: skip
        return [*TINY, text, *keys]

    worlds = {
        1: [case(1, "base", 1, 6, 1, 0), case(1, "accum2", 1, 3, 2, 0)],
        2: [case(2, f"zero{stage}", 2, 6, 1, stage) for stage in range(4)]
        + [case(2, f"zero{stage}-accum2", 2, 3, 2, stage) for stage in range(4)]
        + [case(2, "striped", 2, 6, 1, 1, "parallel.layout=striped")]
        + [case(2, "dp2", 1, 3, 1, 2)],
        3: [case(3, f"zero{stage}", 3, 3, 2, stage) for stage in (0, 3)],
        4: [case(4, f"zero{stage}", 4, 6, 1, stage) for stage in (1, 3)]
        + [case(4, f"dp2-zero{stage}", 2, 3, 1, stage) for stage in range(4)]
        + [case(4, "dp2-contiguous", 2, 1, 3, 1, "parallel.layout=contiguous")],
    }
    runs = []
    for world, cases in worlds.items():
        listing = tmp_path / f"{world}.json"
        listing.write_text(json.dumps(cases))
        status, output = launch(world, ROOT / "tests/workers/several_runs.py", str(listing))
        assert status == 0, output
        runs += [Path(k[8:]) for keys in cases for k in keys if k.startswith("run_dir=")]
    base = metrics(runs[0])
    assert len(base) == 3 and len(runs) == 21
    for run in runs[1:]:
        for want, got in zip(base, metrics(run), strict=True):
            for key in ("loss", "grad_norm"):
                assert got[key] == pytest.approx(want[key], rel=1e-4), (run.name, key, want["step"])
            for key in ("tokens_seen", "lr", "supervised_tokens", "step"):
                assert got[key] == want[key], (run.name, key)


def _job(run_dir, text, *more):
    return [*TINY, text, f"run_dir={run_dir}", "parallel.cp=2", "train.steps=60", *more]


def _wait_for(path, condition, job, limit=90):
    until = time.monotonic() + limit
    while time.monotonic() < until:
        if path.exists() and condition(path):
            return
        assert job.process.poll() is None, job.finish(10)[1]
        time.sleep(0.02)
    raise AssertionError(f"nothing in {path} after {limit} s")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, text):
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    status, output = train(2, *_job(run_dir, text))
    assert status == 0, output
    return [(m["step"], m["loss"], m["grad_norm"]) for m in metrics(run_dir)]


def _resumed(run_dir, text, *more):
    status, output = train(2, *_job(run_dir, text, *more))
    assert status == 0 and "resumed" in output, output
    return [(m["step"], m["loss"], m["grad_norm"]) for m in metrics(run_dir)]


def test_sigterm_saves_and_exits_zero_and_resume_changes_nothing(tmp_path, text, undisturbed):
    run_dir = tmp_path / "run"
    with Launch(2, ROOT / "train.py", *_job(run_dir, text)) as job:
        _wait_for(run_dir / "metrics.jsonl", lambda p: len(p.read_text().splitlines()) > 4, job)
        os.kill(job.workers()[1], signal.SIGTERM)
        status, output = job.finish()
    assert status == 0 and "stopped by SIGTERM" in output, output
    assert 4 < len(metrics(run_dir)) < 60
    assert _resumed(run_dir, text) == undisturbed


def test_sigkill_of_one_rank_and_resume(tmp_path, text, undisturbed):
    run_dir = tmp_path / "run"
    keys = ("checkpoint.every=3", "engine.zero_stage=1")
    with Launch(2, ROOT / "train.py", *_job(run_dir, text, *keys)) as job:
        _wait_for(run_dir / "checkpoints/step_6/ringattn.json", lambda p: True, job)
        os.kill(job.workers()[0], signal.SIGKILL)
        assert job.finish()[0] != 0
    assert _resumed(run_dir, text, *keys) == undisturbed


def test_four_processes_make_one_run(tmp_path, text):
    run_dir = tmp_path / "runs" / "one"
    status, output = train(
        4, *TINY, text, f"run_dir={run_dir}", "logger=wandb", "train.steps=2",
        "train.sample_tokens=3", "parallel.cp=2", "precision=bf16",
    )  # fmt: skip
    assert status == 0, output
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["one"]
    assert len(list(run_dir.glob("wandb/offline-run-*"))) == 1
    assert [m["step"] for m in metrics(run_dir)] == [1, 2]
    assert (run_dir / "config.yaml").is_file()
    for shown in ("resolved plan", "self-check passed", "sample", str(run_dir)):
        assert shown in output
    steps = [m["tokens_seen"] for m in metrics(run_dir)]
    assert all(a < b for a, b in pairwise(steps))
