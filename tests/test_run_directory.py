"""One living run per directory, and what it means to go on in one."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ringattn import living
from ringattn.training.config import load, resolved, without_effect
from ringattn.training.launching import directory
from ringattn.training.launching.directory import InUse, Lock, create, holder
from ringattn.training.optimizer import Schedule

from .processes import ROOT, TINY, Launch, metrics, train, wait_until


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(directory, "PERIOD_S", 0.2)


def change(lock, **keys):
    lock.write_text(json.dumps(json.loads(lock.read_text()) | keys))


def test_a_second_run_is_refused_while_the_first_lives(tmp_path, quick):
    assert holder(tmp_path) is None
    with Lock(tmp_path):
        assert f"process {os.getpid()} on {socket.gethostname()}" in holder(tmp_path)
        with pytest.raises(InUse, match="in use by another run"), Lock(tmp_path):
            pass
        time.sleep(0.5)  # some beats
        assert holder(tmp_path) and [p.name for p in tmp_path.iterdir()] == ["lock"]
    assert not tmp_path.exists()  # it was empty
    tmp_path.mkdir()


def test_locks_of_dead_processes_are_seen_through(tmp_path, quick):
    code = (
        "import os, pathlib; from ringattn.training.launching.directory import Lock; "
        f"Lock(pathlib.Path({str(tmp_path)!r})).__enter__(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert (tmp_path / "lock").exists()
    assert holder(tmp_path) is None
    (tmp_path / "kept").touch()
    # Another process has its id by now.
    change(tmp_path / "lock", pid=os.getpid())
    assert holder(tmp_path) is None
    with Lock(tmp_path):
        assert holder(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_lock_that_is_damaged_is_no_living_run(tmp_path, quick, content):
    (tmp_path / "kept").touch()
    (tmp_path / "lock").write_text(content)
    with Lock(tmp_path):
        assert holder(tmp_path)


def test_a_run_on_another_machine_is_heard(tmp_path, quick, monkeypatch):
    lock = tmp_path / "lock"
    lock.write_text(json.dumps({"host": "other", "pid": 5, "place": "there", "beat": 0}))
    stop = threading.Event()

    def beat():
        count = 0
        while not stop.wait(0.1):
            count += 1
            change(lock, beat=count)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        assert "process 5 on other" in holder(tmp_path)
        assert holder(tmp_path, listen=False) is None
        # Whatever their torchruns are called.
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a-job")
        with pytest.raises(InUse, match="process 5 on other"), Lock(tmp_path):
            pass
    finally:
        stop.set()
        thread.join()
    assert holder(tmp_path) is None  # it is silent now
    with Lock(tmp_path):
        assert f"process {os.getpid()}" in holder(tmp_path)


def test_of_many_that_come_at_once_one_gets_it(tmp_path, quick, monkeypatch):
    """Over a stale lock, and where a file system has no links."""
    for links in (True, False):
        if not links:
            monkeypatch.setattr(os, "link", lambda *a: (_ for _ in ()).throw(PermissionError()))
        for _ in range(30):
            (tmp_path / "kept").touch()
            (tmp_path / "lock").write_text(json.dumps({"place": living.place(), "pid": 0}))
            got, gate = [], threading.Barrier(4)

            def come(got=got, gate=gate):
                gate.wait()
                lock = Lock(tmp_path)
                try:
                    lock.__enter__()
                    got.append(lock)
                except InUse:
                    pass

            threads = [threading.Thread(target=come) for _ in range(4)]
            [t.start() for t in threads]
            [t.join() for t in threads]
            assert len(got) == 1, links
            got[0].__exit__()


def test_one_that_died_while_it_replaced_a_lock_blocks_nobody(tmp_path, quick):
    for place in (living.place(), "elsewhere"):
        (tmp_path / "kept").touch()
        for name in ("lock", ".taking"):
            (tmp_path / name).write_text(json.dumps({"place": place, "pid": 0}))
        with Lock(tmp_path):
            assert not (tmp_path / ".taking").exists()


def test_a_lock_that_may_not_be_read_is_not_nobodys(tmp_path, quick, monkeypatch):
    """As of another user; root reads everything, so it is pretended."""
    lock, read = tmp_path / "lock", Path.read_bytes
    lock.touch()

    def forbidden(path):
        if path == lock:
            lock.touch()  # its owner goes on writing it
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(InUse), Lock(tmp_path):
        pass


def test_a_run_that_lost_its_directory_ends(tmp_path):
    code = (
        "import pathlib, time; from ringattn.training.launching import directory as d; "
        f"d.PERIOD_S = 0.1; d.Lock(pathlib.Path({str(tmp_path)!r})).__enter__(); time.sleep(60)"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    wait_until((tmp_path / "lock").exists, run)
    taken = tmp_path / "other"
    taken.write_text(json.dumps({"host": "other", "pid": 7, "token": "x"}))
    taken.replace(tmp_path / "lock")
    _, error = run.communicate(timeout=30)
    assert run.returncode == 1 and "another run has taken it (other, process 7)" in error


def test_default_names_are_made_once(tmp_path):
    paths = [create(tmp_path / "runs/now", True) for _ in range(3)]
    assert [p.name for p in paths] == ["now", "now-2", "now-3"]
    assert create(paths[0], False) == paths[0]


def test_a_second_start_touches_nothing(tmp_path, text):
    run_dir = tmp_path / "run"
    keys = [*TINY, text, f"run_dir={run_dir}", "checkpoint.every=5"]
    with Launch(1, ROOT / "train.py", *keys, "train.steps=100000") as running:
        wait_until(lambda: list(run_dir.glob("checkpoints/step_*/ringattn.json")), running.process)
        before = (run_dir / "config.yaml").stat().st_mtime_ns
        status, output = train(2, *keys, "train.steps=3", "checkpoint.resume=never")
        assert status == 2 and "is in use by another run: process" in output, output
        assert (run_dir / "config.yaml").stat().st_mtime_ns == before
        assert not list(run_dir.glob("superseded_*"))
        os.kill(running.workers()[0], signal.SIGTERM)
        status, output = running.finish()
        assert status == 0, output
    assert not (run_dir / "lock").exists()


def test_what_a_resume_means_is_said(tmp_path, text):
    run_dir = tmp_path / "run"
    keys = [*TINY, text, f"run_dir={run_dir}"]
    status, output = train(1, *keys, "train.steps=4")
    assert status == 0 and "the learning rate" not in output, output

    def everything():
        return {p: p.stat().st_mtime_ns for p in run_dir.rglob("*") if p.is_file()}

    before = everything()
    for steps in (4, 2):
        status, output = train(1, *keys, f"train.steps={steps}")
        assert status == 0 and f"is at step 4, train.steps={steps}; give more" in output, output
        assert everything() == before
    status, output = train(1, *keys, "train.steps=8", "profile.steps=[2,3]")
    said = " ".join(output.split())
    assert status == 0, output
    old, new = (Schedule(3e-3, 0.1, 1000, steps * 97) for steps in (4, 8))
    rates = [f"{each.rate(4 * 97):.3g} ({each})" for each in (old, new)]
    assert f"the learning rate changes at step 4 from {rates[0]} to {rates[1]}" in said
    assert [line["lr"] for line in metrics(run_dir)][4] == new.rate(4 * 97)
    assert "profile.steps=[2, 3] has no effect: this run makes steps 5 to 8" in said


@pytest.mark.parametrize(
    ("keys", "shown"),
    [
        (["profile.steps=[700,701]"], "profile.steps=[700, 701] has no effect: this run makes"),
        (["attention.sinks=4"], "attention.sinks=4 has no effect"),
        (["eval.probes=[passkey]"], "eval.probes=['passkey'] has no effect: eval.every=0"),
        (["eval.root=x"], "eval.root=x has no effect"),
        (["train.sample_prompt=Hello"], "train.sample_prompt='Hello' has no effect"),
        (["checkpoint.every=null", "checkpoint.keep=1"], "checkpoint.keep=1 has no effect"),
        (["attention.kinds={m:{mixer:gated_delta}}", "attention.pattern=[m]",
          "parallel.ulysses=2"], "parallel.ulysses=2 has no effect"),
    ],
)  # fmt: skip
def test_keys_without_effect_are_said(keys, shown):
    run = resolved(load([*TINY, "data.root=x", *keys]), 2)
    (line,) = without_effect(run, 0)
    assert line.startswith(shown)


def test_keys_with_effect_are_not_said():
    keys = ["profile.steps=[3,4]", "attention.sinks=4", "attention.window=8", "eval.every=5",
            "eval.probes=[passkey]", "parallel.ulysses=2"]  # fmt: skip
    assert without_effect(resolved(load([*TINY, "data.root=x", *keys]), 2), 0) == []
