"""What a run survives, and what it says when it cannot: kills, damage, full disks, stopped
ranks.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from ringattn import living

from .processes import PATIENCE_S, ROOT, TINY, Launch, launch, metrics, train, wait_until


def job(run_dir, text, *more):
    return [*TINY, text, f"run_dir={run_dir}", "parallel.cp=2", *more]


def test_kills_under_max_restarts_change_nothing():
    """benchmarks/restarts.py does it 20 times; the run without a directory of its own finds it."""
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks/restarts.py", "--kills", "2",
         "--limit", str(PATIENCE_S / 2), "train.steps=60"],
        capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(run.stdout.splitlines()[0])
    assert report["equal"] and report["kills"] == 2 and report["steps"] == 60


def test_ranks_end_with_a_torchrun_that_is_killed(tmp_path, text):
    """What starts it anew would meet them else, in the directory and on the devices."""
    keys = job(tmp_path / "run", text, "train.steps=2000", "checkpoint.every=3")
    with Launch(2, ROOT / "train.py", *keys) as running:
        saved = tmp_path / "run/checkpoints/step_6/ringattn.json"
        wait_until(saved.exists, running.process)
        ranks = running.workers()
        assert len(ranks) == 2
        running.process.kill()
        end = time.monotonic() + PATIENCE_S
        while any(map(living.started, ranks)):
            assert time.monotonic() < end
            time.sleep(0.05)
    assert len(metrics(tmp_path / "run")) < 2000
    status, output = train(2, *keys, f"train.steps={len(metrics(tmp_path / 'run')) + 2}")
    assert status == 0 and "resumed" in output, output
    steps = [m["step"] for m in metrics(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1))


def test_a_restart_finds_the_run_directory_that_was_not_named(tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    keys = [key for key in job("x", text, "train.steps=40", "checkpoint.every=2")
            if not key.startswith("run_dir")]  # fmt: skip
    with Launch(2, ROOT / "train.py", *keys, restarts=1) as running:
        wait_until(
            lambda: list(tmp_path.glob("runs/*/checkpoints/step_4/ringattn.json")), running.process
        )
        os.kill(running.workers()[0], signal.SIGKILL)
        status, output = running.finish()
    assert status == 0 and "resumed" in output, output
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert [m["step"] for m in metrics(run_dir)] == list(range(1, 41))


def test_ranks_that_start_at_other_times_find_each_other():
    status, output = launch(4, ROOT / "tests/workers/late.py")
    assert status == 0, output


def test_ranks_may_leave_training_at_other_times():
    """A rank whose neighbour is done is still heard; a store that left with its rank fails none."""
    status, output = launch(3, ROOT / "tests/workers/leaving.py")
    assert status == 0, output


def test_a_stopped_rank_is_named_with_its_step(tmp_path, text):
    run_dir = tmp_path / "run"
    keys = ("train.steps=100000", "parallel.timeout_s=8")
    with Launch(2, ROOT / "train.py", *job(run_dir, text, *keys)) as running:
        file = run_dir / "metrics.jsonl"
        wait_until(lambda: file.exists() and file.read_text(), running.process)
        time.sleep(2.5)  # beats say where a rank is once a second
        waiting, stopped = running.workers()
        os.kill(stopped, signal.SIGSTOP)
        # torchrun would give it half a minute to end.
        wait_until(lambda: waiting not in running.workers(), running.process)
        os.kill(stopped, signal.SIGCONT)
        status, output = running.finish()
    said = [line for line in output.splitlines() if "has not been heard of" in line]
    assert status != 0 and said, output
    assert "rank 0: rank 1 has not been heard of" in said[0]
    assert "it was at step " in said[0] and "parallel.timeout_s=8" in said[0]


def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, text):
    run_dir = tmp_path / "run"
    keys = ("checkpoint.every=1", "checkpoint.keep=4", "train.steps=6", "optim.min_lr_ratio=1")
    status, output = train(2, *job(run_dir, text, *keys))
    assert status == 0, output
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == [
        f"step_{n}" for n in (3, 4, 5, 6)
    ]
    before = [(m["loss"], m["grad_norm"]) for m in metrics(run_dir)]
    changed = run_dir / "checkpoints/step_6/rank_00001.safetensors"
    content = bytearray(changed.read_bytes())
    content[-5] ^= 1  # one bit
    changed.write_bytes(content)
    cut = run_dir / "checkpoints/step_5/rank_00000.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    (run_dir / "checkpoints/step_7").mkdir()  # half-written: it has no manifest
    (run_dir / "checkpoints/step_1").mkdir()  # half-removed
    status, output = train(2, *job(run_dir, text, *keys))
    assert status == 0, output
    assert "step_6 is damaged: rank_00001.safetensors has changed" in output
    assert "step_5 is damaged: rank_00000.safetensors has" in output
    assert "step_4 at step 4" in output
    assert not (run_dir / "checkpoints/step_1").exists()
    assert [(m["loss"], m["grad_norm"]) for m in metrics(run_dir)] == before
    for path in run_dir.glob("**/*.safetensors"):
        path.write_bytes(b"")
    status, output = train(2, *job(run_dir, text, *keys))
    assert status != 0 and "no other is left" in output, output


def test_a_full_disk_ends_with_a_line_and_the_earlier_checkpoint(tmp_path, text):
    run_dir = tmp_path / "run"
    keys = ("checkpoint.every=1", "train.steps=100000", "checkpoint.keep=null")
    with Launch(2, ROOT / "train.py", *job(run_dir, text, *keys)) as running:
        first = run_dir / "checkpoints/step_1/ringattn.json"
        wait_until(first.exists, running.process)
        # No file may grow beyond 20 kB: what a full disk does to a checkpoint.
        resource.prlimit(running.workers()[1], resource.RLIMIT_FSIZE, (20_000, 20_000))
        status, output = running.finish()
    (line,) = {line for line in output.splitlines() if line.startswith("train.py:")}
    assert status != 0 and "could not be written: rank_00001" in line, output
    whole = sorted(run_dir.glob("checkpoints/step_*/ringattn.json"))
    left = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert whole and left == sorted(path.parent.name for path in whole)  # nothing half-written
    status, output = train(2, *job(run_dir, text, "train.steps=1000", "checkpoint.resume=auto",
                                   f"train.steps={len(whole) + 1}"))  # fmt: skip
    assert status == 0 and f"resumed {run_dir}/checkpoints/step_" in output, output


def test_a_vanished_run_directory_ends_with_a_line(tmp_path, text):
    run_dir = tmp_path / "run"
    keys = ("checkpoint.every=1", "train.steps=100000")
    with Launch(2, ROOT / "train.py", *job(run_dir, text, *keys)) as running:
        wait_until((run_dir / "checkpoints/step_2/ringattn.json").exists, running.process)
        run_dir.rename(tmp_path / "away")
        status, output = running.finish()
    lines = [line for line in output.splitlines() if line.startswith("train.py:")]
    assert status != 0 and len(lines) == 1, output
    assert str(run_dir) in lines[0] and "No such file" in lines[0]
    assert list(tmp_path.glob("away/checkpoints/step_*/ringattn.json"))
    assert not run_dir.exists()  # not made again


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_a_step_that_is_not_finite_is_skipped_by_every_engine(tmp_path, text, kind, monkeypatch):
    monkeypatch.setenv("POISON", kind)
    engines = {
        **{f"zero{s}": [f"engine.zero_stage={s}"] for s in range(4)},
        **{f"bf16-{s}": [f"engine.zero_stage={s}", "precision=bf16"] for s in (0, 1, 3)},
        "fsdp": ["engine=fsdp"],
        "fsdp-bf16": ["engine=fsdp", "precision=bf16"],
    }
    keys = ("train.steps=5", "checkpoint.every=1", "checkpoint.keep=null")
    listing = tmp_path / "cases.json"
    cases = [job(tmp_path / name, text, *keys, *more) for name, more in engines.items()]
    listing.write_text(json.dumps(cases))
    status, output = launch(2, ROOT / "tests/workers/poisoned.py", str(listing))
    assert status == 0, output
    assert output.count(f"step 3 skipped: loss {kind}, gradient norm ") == len(engines)
    for name in engines:
        want = metrics(tmp_path / ("bf16-1" if "bf16" in name else "zero1"))
        got = metrics(tmp_path / name)
        assert [m["skipped_steps"] for m in got] == [0, 0, 1, 1, 1]
        assert got[2]["loss"] is None and got[2]["grad_norm"] is None
        for a, b in zip(want, got, strict=True):
            for key in ("loss", "grad_norm") if a["step"] != 3 else ():
                assert a[key] == pytest.approx(b[key], rel=3e-3 if "bf16" in name else 1e-4), name
        (line,) = (tmp_path / name / "skipped.jsonl").read_text().splitlines()
        assert json.loads(line)["sequences"] == [2] and json.loads(line)["step"] == 3
        for rank in range(2):
            two, three = (
                load_file(tmp_path / name / f"checkpoints/step_{s}/rank_0000{rank}.safetensors")
                for s in (2, 3)
            )
            assert all(two[key].equal(three[key]) for key in two), name  # nothing has changed


def test_a_run_directory_that_cannot_be_written(tmp_path, text):
    """As on a read-only file system, which not even root may write to."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "checkpoints").write_text("a file where a folder must be")
    status, output = train(1, *TINY, text, f"run_dir={run_dir}", "train.steps=1")
    assert status != 0 and "ringattn/training" not in output, output
    assert f"(run directory: {run_dir})" in output


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(
    "engine",
    [["engine.zero_stage=1", "memory=long"], ["engine.zero_stage=2"],
     ["engine.zero_stage=3", "memory=long"], ["engine=fsdp", "engine.zero_stage=2"],
     ["engine=fsdp", "engine.zero_stage=2", "model.tied=true"],
     ["engine=fsdp", "memory=long"]],
)  # fmt: skip
def test_a_stop_within_a_micro_step_keeps_the_step_before(tmp_path, text, engine, where):
    """It is served after the next layer, of the forward, the recomputation or the backward: half a
    step is thrown away, on all ranks; the run then goes on as if nothing had been."""
    keys = ["train.steps=5", "train.grad_accum=2", "checkpoint.every=0", *engine]
    listing = tmp_path / "cases.json"
    cases = [job(tmp_path / name, text, *keys) for name in ("stopped", "whole")]
    listing.write_text(json.dumps(cases))
    # The last micro-step of step 3.
    status, output = launch(2, ROOT / "tests/workers/stopping.py", where, "6", listing)
    assert status == 0 and "stopped on request at step 2; checkpoint saved" in output, output
    assert [m["step"] for m in metrics(tmp_path / "stopped")] == [1, 2]
    status, output = train(2, *cases[0])
    assert status == 0 and "at step 2" in output, output
    got, want = (
        [(m["step"], m["loss"], m["grad_norm"]) for m in metrics(tmp_path / name)]
        for name in ("stopped", "whole")
    )
    assert got == want


def test_a_request_is_heard_while_the_main_thread_is_busy_elsewhere():
    """As in a backward whose layers another thread goes through: handlers in Python do not run."""
    said = """
import hashlib, os, signal, threading, time
from ringattn.training.stopping import stop_requests

def heard():
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGTERM)
    while not len(stops) and busy:
        time.sleep(0.01)
    print("busy" if busy else "late")

begin = time.perf_counter()
hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000)
rounds = int(3e5 / (time.perf_counter() - begin))
with stop_requests() as stops:
    busy, thread = True, threading.Thread(target=heard)
    thread.start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", rounds)
    busy = False
    thread.join()
"""
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, timeout=300)
    assert done.stdout == "busy\n", done.stderr


def test_a_stop_ends_an_evaluation_and_what_was_saved_before_it_counts(tmp_path, text):
    keys = ["train.steps=4", "checkpoint.every=2", "eval.every=2", "eval.probes=[passkey]",
            "eval.samples=6", "eval.lengths=[110]", "eval.depths=[0.5]"]  # fmt: skip
    listing = tmp_path / "cases.json"
    listing.write_text(json.dumps([job(tmp_path / "run", text, *keys)]))
    status, output = launch(2, ROOT / "tests/workers/stopping.py", "evaluation", "3", listing)
    assert status == 0 and "evaluation at step 2 left out" in output, output
    assert "stopped on request at step 2" in output
    assert not (tmp_path / "run/eval.jsonl").exists()
    assert (tmp_path / "run/checkpoints/step_2/ringattn.json").exists()
    status, output = train(2, *job(tmp_path / "run", text, *keys))
    lines = (tmp_path / "run/eval.jsonl").read_text().splitlines()
    # The one that was left out comes first.
    assert status == 0 and [json.loads(line)["step"] for line in lines] == [2, 4]


def test_a_kill_in_the_last_evaluation_costs_neither_it_nor_the_training(tmp_path, text):
    keys = ["train.steps=2", "eval.every=2", "eval.probes=[passkey]", "eval.samples=40",
            "eval.lengths=[110]", "eval.depths=[0.5]"]  # fmt: skip
    listing = tmp_path / "cases.json"
    listing.write_text(json.dumps([job(tmp_path / "run", text, *keys)]))
    worker = ROOT / "tests/workers/stopping.py"
    status, output = launch(2, worker, "evaluation", "20", listing, "SIGKILL")
    assert status != 0, output
    saved = tmp_path / "run/checkpoints/step_2/ringattn.json"
    written = saved.stat().st_mtime_ns
    assert not (tmp_path / "run/eval.jsonl").exists()
    for lines in (1, 1):
        status, output = train(2, *job(tmp_path / "run", text, *keys))
        assert status == 0, output
        assert len((tmp_path / "run/eval.jsonl").read_text().splitlines()) == lines
        assert saved.stat().st_mtime_ns == written
    assert "nothing left to do" in output


@pytest.mark.parametrize(
    ("arguments", "variable", "grace"),
    [([], None, 30), ([], "45", 45), (["--shutdown-timeout", "50"], "45", 50),
     (["--shutdown_timeout=60"], None, 60), ([], "no number", 30)],
)  # fmt: skip
def test_the_grace_is_torchruns(arguments, variable, grace):
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    ask = "from ringattn.training.launching.limit import grace_s; print(grace_s())"
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "x"}
    environment |= {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": variable} if variable else {}
    said = subprocess.run(
        [sys.executable, "-c", code, ask, *arguments], env=environment, cwd=ROOT,
        capture_output=True, text=True, timeout=PATIENCE_S,
    ).stdout  # fmt: skip
    assert int(said) == grace


def test_a_step_that_outlasts_the_grace_is_said_once(tmp_path, text, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    keys = ("train.steps=4",)
    for grace, said in (("0", 1), ("9999", 0)):
        monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", grace)
        status, output = train(2, *job(tmp_path / grace, text, *keys))
        shown = " ".join(output.split())
        assert status == 0 and shown.count("torchrun --shutdown-timeout 60") == said, output
