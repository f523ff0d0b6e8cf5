"""Rough handling: hostile values, damaged starts, killed helpers. One line, nothing left."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from ringattn import living, typed
from ringattn.cli import main as cli
from ringattn.cli.plan import KEYS as PLAN
from ringattn.cli.tokenize import BPE, TOKENIZE
from ringattn.data import shards
from ringattn.data.records import Source
from ringattn.data.tokenizer import LEAST_BPE
from ringattn.training.checkpoints.states import digest
from ringattn.training.config import load, resolved
from ringattn.training.launching.limit import out_of_memory
from ringattn.training.observing.metrics import append
from ringattn.training.run import TrainingRun
from ringattn.typed import SettingsError

from .processes import PATIENCE_S, ROOT, TINY, metrics, train

HOSTILE = [
    "", "null", "-1", "0", "1", "1.5", "1e400", "nan", "-inf", "true", "[]", "{}", "[1,2", "'", '"',
    "${x}", "${oc.env:NOBODY}", "${model.dim}", "???", "a b", "../..", "/dev/null", "é✓", "\x00",
    "9" * 30, "[a,[b]]", "{a:b}", "{a:{mixer:moba}}", "[null]", "auto", "causal", "$HOME", "~",
    "\\", "a=b", "!!python/object:os.system", "0x10", "1_000", "\n", "*", "<|x|>", "[-1,3]",
    "[3,1]",
]  # fmt: skip


def test_no_command_line_is_a_traceback(tmp_path):
    """300 of keys and values that nobody means: a checked run, or one line."""
    draw = random.Random(0)
    names = [key.name for key in typed.keys(TrainingRun)]
    groups = [*typed.groups(TrainingRun), "experiment"]
    refused = []
    for _ in range(300):
        words = [f"data.root={tmp_path}"]
        for _ in range(draw.choice([1, 1, 2, 3])):
            name = draw.choice(names if draw.random() < 0.85 else groups)
            form = draw.choice(
                ["{}={}", "{}={}", "{}={}", "+{}={}", "~{}", "{}", "{}.x={}", "x{}={}"]
            )
            words.append(form.format(name, draw.choice(HOSTILE)))
        try:
            resolved(load([*TINY, *words]), draw.choice([1, 2, 3, 8]))
        except SettingsError as error:
            refused.append(str(error))
        except Exception as error:
            raise AssertionError(f"{words}: {type(error).__name__}: {error}") from error
    assert 150 < len(refused) < 300
    assert not [line for line in refused if "\n" in line or len(line) < 9]


@pytest.mark.parametrize(
    ("command", "keys"), [("plan", PLAN), ("bpe", BPE), ("tokenize", TOKENIZE)]
)
def test_no_request_is_a_traceback(tmp_path, capsys, command, keys):
    draw = random.Random(1)
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("some text")
    usual = {
        "plan": ["n=64", "world=2"],
        "bpe": [f"root={tmp_path}/text", f"out={tmp_path}/bpe.json"],
        "tokenize": [f"root={tmp_path}/text", f"out={tmp_path}/tokens"],
    }[command]
    for _ in range(60):
        given = {key: draw.choice(HOSTILE) for key in draw.sample([*keys], draw.choice([1, 2]))}
        for name in ("out", "root"):  # nothing is written elsewhere
            given.pop(name, None)
        words = [w for w in usual if w.split("=")[0] not in given]
        words += [f"{key}={value}" for key, value in given.items()]
        for path in (tmp_path / "bpe.json", tmp_path / "tokens"):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(True)
        try:
            status = cli([command, *words])
        except SystemExit as ended:
            status = ended.code
        said = capsys.readouterr().err
        last = said.strip().splitlines()[-1] if said.strip() else ""
        assert status == 0 or (status == 2 and last.startswith(f"ringattn {command}: ")), (
            words,
            said,
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_start_that_is_no_number_is_refused_on_all_ranks(tmp_path, text, value):
    run_dir = tmp_path / "run"
    keys = [*TINY, text, f"run_dir={run_dir}"]
    assert train(2, *keys, "train.steps=1")[0] == 0
    folder = run_dir / "checkpoints/step_1"
    manifest = json.loads((folder / "ringattn.json").read_text())
    file = folder / "rank_00001.safetensors"
    tensors = load_file(file)
    name = next(key for key in sorted(tensors) if key.startswith("weight"))
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file)
    manifest["files"][file.name] = [file.stat().st_size, digest(file)]
    (folder / "ringattn.json").write_text(json.dumps(manifest))
    status, output = train(2, *keys, "train.steps=2")
    lines = [line for line in output.splitlines() if line.startswith("train.py:")]
    assert status == 1 and len(lines) == 1 and "not all finite" in lines[0], output
    assert name.split(":")[2] in lines[0]
    assert [m["step"] for m in metrics(run_dir)] == [1]


def test_an_odd_wandb_id_is_one_line(tmp_path, text):
    (tmp_path / "wandb_id").write_text("odd/id:\n*")
    status, output = train(2, *TINY, text, f"run_dir={tmp_path}", "logger=wandb", "train.steps=1")
    lines = [line for line in output.splitlines() if line.startswith("train.py:")]
    assert status == 2 and "which is no id of a wandb run" in lines[0], output
    assert "Traceback" not in output


def test_memory_that_is_too_little_is_told_from_other_failures():
    for error in (MemoryError(), RuntimeError("Resource temporarily unavailable"),
                  OSError(12, "Cannot allocate memory"), ImportError("failed to map segment from"),
                  RuntimeError("can't start new thread")):  # fmt: skip
        assert out_of_memory(error)
    for error in (OSError(28, "No space left on device"), ImportError("no module"), ValueError()):
        assert not out_of_memory(error)
    with pytest.raises(SettingsError, match=r"memory\.limit must be .*at least 0\.2"):
        load([*TINY, "data.root=x", "memory.limit=0.001"])


def test_a_full_disk_of_metrics_names_the_file(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device.*metrics\.jsonl"):
        append(tmp_path / "metrics.jsonl", {"step": 1})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["export", "checkpoint=", "out=x"],
            "checkpoint=: no finished checkpoint there (give a run",
        ),
        (["export", "checkpoint=auto", "out=x"], "checkpoint=auto: no finished"),
        (["bpe", "root=.", "vocab_size=256", "out=x"], f"vocab_size must be at least {LEAST_BPE}"),
        (["bpe", "root=.", "out=/proc/x/y.json"], "out=/proc/x/y.json cannot be written"),
        (["tokenize", "root=.", "out=/proc/x"], "out=/proc/x cannot be written"),
        (["plan", "n=64", "world=2", "--plot", "/proc/x.png"], "--plot=/proc/x.png cannot be"),
        (["plan", "n=64", "world=2", "--plot", "/nowhere/x.png"], "there is no folder /nowhere"),
    ],
)
def test_requests_that_cannot_be_are_one_line(capsys, words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli(words) == 2
    assert said in capsys.readouterr().err


SLOW = """
import sys, time
from pathlib import Path
from ringattn.data import shards
from ringattn.data.records import Source

if __name__ == "__main__":
    source = Source.open(sys.argv[1], "*.jsonl")
    print("begun", flush=True)
    shards.write(source, Path(sys.argv[2]), workers=3)
"""


def test_killed_tokenizers_leave_nothing(tmp_path):
    root, script = tmp_path / "text", tmp_path / "slow.py"
    root.mkdir()
    line = json.dumps({"text": "the ring goes round " * 5000}) + "\n"
    for name in "abc":
        (root / f"{name}.jsonl").write_text(line * 360)  # a shard each, some seconds of work
    script.write_text(SLOW)
    command = [sys.executable, script, root, tmp_path / "out"]
    run = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    end = time.monotonic() + PATIENCE_S
    workers = []
    while len(workers) < 3 and run.poll() is None and time.monotonic() < end:
        listing = Path(f"/proc/{run.pid}/task/{run.pid}/children")
        workers = [int(p) for p in listing.read_text().split() if _spawned(int(p))]
        time.sleep(0.02)
    while not list(tmp_path.glob("out.*.partial/*.tokens")) and run.poll() is None:
        time.sleep(0.02)
    assert run.poll() is None, "it was too fast to be killed"
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    while any(living.started(pid) for pid in workers):
        assert time.monotonic() < end
        time.sleep(0.05)
    (left,) = tmp_path.glob("*.partial")
    other = tmp_path / "out.elsewhere.5.7.partial"  # of another machine: it may live
    other.mkdir()
    for path in root.iterdir():
        path.write_text(line)
    shards.write(Source.open(str(root), "*.jsonl"), tmp_path / "out", workers=1)
    assert not left.exists() and other.exists()
    assert sorted(p.name for p in tmp_path.glob("out*")) == ["out", other.name]


def _spawned(pid):
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def test_drafts_of_the_living_stay(tmp_path):
    own = living.draft(tmp_path / "x")
    own.mkdir()
    assert living.abandoned(tmp_path) == []
    gone = own.with_name(own.name.replace(f".{os.getpid()}.", ".999999999."))
    reused = own.with_name(own.name.replace(f".{living.started(os.getpid())}.", ".1."))
    for path in (gone, reused):
        path.mkdir()
    assert sorted(living.abandoned(tmp_path)) == sorted([gone, reused])
    assert living.abandoned(tmp_path, "y.*") == []
