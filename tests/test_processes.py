"""Attention and training across real processes."""

import json
import os
import re
import signal
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

from ringattn.execution.carriers import ProcessRank

from .processes import ROOT, TINY, Launch, launch, metrics, train, wait_until


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ring_attention_on_processes(world):
    status, output = launch(world, ROOT / "tests/workers/ring.py")
    assert status == 0, output


@pytest.mark.parametrize("how", ["late", "alone"])
def test_a_refusal_is_always_read_and_once(how):
    """torchrun ends all ranks when one has failed; the one that speaks may be late."""
    status, output = launch(3, ROOT / "tests/workers/refusing.py", how)
    assert status == 2 and output.startswith("train.py: no\n")
    assert how == "alone" or output == "train.py: no\n"


def test_the_loop_of_the_start_page_runs(tmp_path):
    """And its gradient, averaged over the ranks, is that of one rank."""
    page = (ROOT / "docs/start.md").read_text()
    example, mine = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(
        example
        + mine
        + "grad = model.lm_head.weight.grad\n"
        + "dist.all_reduce(grad)\n"
        + "if dist.get_rank() == 0:\n"
        + "    print('norm', grad.norm().item() / context.world)\n"
    )
    norms = []
    for world in (1, 3):
        status, output = launch(world, script)
        assert status == 0, output
        norms += [float(x) for x in re.findall(r"norm ([0-9.]+)", output)]
    assert len(norms) == 2 and norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_a_timeout_names_step_peer_and_shape():
    status, output = launch(2, ROOT / "tests/workers/silent_peer.py")
    assert status == 0, output
    shape = r"\[1, [0-9]+, 2, 8\]"
    said = rf"said: the exchange of K/V, step 0 failed: to rank 1 {shape}.* from rank 1 {shape}"
    assert re.search(said, output), output
    # A peer that was never there is missed by the question that comes before the first call.
    assert "said: ranks ask each other, at call 1: no answer" in output


def _case(run_dir, text, cp, batch, accum, stage, *more):
    return [
        *TINY, text, f"parallel.cp={cp}", f"batch_size={batch}", f"train.grad_accum={accum}",
        f"engine.zero_stage={stage}", f"run_dir={run_dir}", "train.steps=3", *more,
    ]  # fmt: skip


def _train_all(tmp_path, worlds):
    """Trains {world: {name: case}}, one launch a world; {name: metrics}, in the same order."""
    for world, cases in worlds.items():
        listing = tmp_path / f"{world}.json"
        listing.write_text(json.dumps(list(cases.values())))
        status, output = launch(world, ROOT / "tests/workers/several_runs.py", str(listing))
        assert status == 0, output
    return {name: metrics(tmp_path / name) for cases in worlds.values() for name in cases}


def _assert_equal(want, got, name, tolerance=1e-4):
    assert len(want) == len(got) > 0, name
    for a, b in zip(want, got, strict=True):
        for key in ("loss", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=tolerance), (name, key, a["step"])
        for key in ("tokens_seen", "lr", "supervised_tokens", "step"):
            assert b[key] == a[key], (name, key)


def check_every_split(tmp_path, case, **more):
    """A model's losses on 1 to 4 ranks, both engines, are those of one rank; resumed on 3 ranks
    too. ``case(name, *keys)``: the arguments of a run of three steps in tmp_path / name; ``more``:
    {world: {name: case}} beside, as world_1. Returns {name: metrics}."""
    worlds = {
        1: {"one": case("one"), "one_of_two": case("one_of_two", "train.grad_accum=2")},
        2: {
            "two": case("two", "parallel.schedule=direct", "parallel.layout=balanced"),
            "first": case("first", "checkpoint.every=2", "engine=fsdp"),
        },
        3: {"three": case("three", "engine.zero_stage=3", "memory.checkpoint=true")},
        4: {
            "four": case("four", "engine=fsdp", "parallel.schedule=auto"),
            "mesh": case("mesh", "parallel.cp=2", "parallel.ulysses=2", "engine=fsdp"),
        },
    }
    for world, cases in more.items():
        worlds[int(world.removeprefix("world_"))] |= cases
    runs = _train_all(tmp_path, worlds)
    for name in ("two", "three", "four", "first"):
        _assert_equal(runs["one"], runs[name], name)
    _assert_equal(runs["one_of_two"], runs["mesh"], "2 x 2 ranks, two sequences a step")
    again = f"checkpoint.resume={tmp_path / 'first/checkpoints/step_2'}"
    resumed = _train_all(tmp_path, {3: {"second": case("second", again, "engine.zero_stage=3")}})
    _assert_equal(runs["one"][2:], resumed["second"], "resumed on 3 ranks")
    return runs


def test_same_losses_for_every_split_stage_and_accumulation(tmp_path, text):
    """Six sequences a step throughout; unequal documents leave ranks unequally supervised."""

    def case(name, *rest):
        return {name: _case(tmp_path / name, text, *rest)}

    def of(name):
        return f"checkpoint.resume={tmp_path / name}/checkpoints/step_2"

    save = "checkpoint.every=2"
    long = ("memory=long", "memory.offload=true", "memory.ffn_tile=16", "memory.loss_chunk=20")
    worlds = {
        1: case("base", 1, 6, 1, 0, "checkpoint.every=2") | case("accum2", 1, 3, 2, 0),
        2: case("striped", 2, 6, 1, 1, "parallel.layout=striped") | case("dp2", 1, 3, 1, 2),
        3: {},
        4: case("dp2-contiguous", 2, 1, 3, 1, "parallel.layout=contiguous"),
    }
    worlds[2] |= case("all-gather", 2, 6, 1, 0, "parallel.schedule=all_gather")
    worlds[2] |= case("auto", 2, 6, 1, 0, "parallel.schedule=auto", "parallel.layout=balanced")
    worlds[4] |= case("ulysses-direct", 4, 6, 1, 1, "parallel.schedule=direct",
                      "parallel.ulysses=2", "parallel.layout=balanced")  # fmt: skip
    worlds[4] |= case("double-ring", 4, 6, 1, 0, "parallel.schedule=double_ring",
                      "parallel.node_size=2")  # fmt: skip
    worlds[4] |= case("dp2-ulysses", 2, 3, 1, 2, "parallel.ulysses=2")
    for stage in range(4):
        worlds[2] |= case(f"cp2-zero{stage}", 2, 6, 1, stage)
        worlds[2] |= case(f"cp2-zero{stage}-accum2", 2, 3, 2, stage)
        worlds[4] |= case(f"cp2-dp2-zero{stage}", 2, 3, 1, stage)
    for stage in (0, 3):
        worlds[3] |= case(f"cp3-zero{stage}", 3, 3, 2, stage)
        worlds[4] |= case(f"cp4-zero{stage}", 4, 6, 1, stage, save)
    worlds[2] |= case("fsdp", 2, 3, 2, 3, "engine=fsdp", save)
    worlds[2] |= case("fsdp-dp2", 1, 3, 1, 2, "engine=fsdp", "engine.offload_params=true")
    worlds[2] |= case("long", 2, 6, 1, 1, "engine.offload_optimizer=true", *long, save)
    worlds[2] |= case("long-zero3", 2, 6, 1, 3, "engine.offload_params=true", *long, save)
    worlds[4] |= case("fsdp-cp2", 2, 3, 1, 3, "engine=fsdp", "engine.shard=context", *long, save)
    # Any world, stage and engine continues any other.
    worlds[3] |= case("1-to-3", 3, 3, 2, 0, of("base"))
    worlds[3] |= case("zero3-to-fsdp", 3, 6, 1, 2, "engine=fsdp", of("long-zero3"))
    worlds[3] |= case("fsdp-to-zero3", 1, 2, 1, 3, of("fsdp"))
    worlds[4] |= case("fsdp-to-shards", 2, 3, 1, 3, "engine=fsdp", "engine.shard=context",
                      of("fsdp"))  # fmt: skip
    worlds[4] |= case("zero1-to-zero2", 4, 6, 1, 2, of("long"))
    # Two sources by weight and a task, packed by best fit, evaluated before and after.
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text("".join(json.dumps({"text": "round " * n}) + "\n" for n in range(1, 30)))
    mix = (
        f"data.mix=[{{root: {text.split('=')[1]}, weight: 2, glob: '*.txt'}},"
        f"{{root: {tmp_path}, weight: 1, glob: '*.jsonl'}},{{format: recall, weight: 1}}]",
        "eval.first=true",
        "data.packing=best_fit", f"data.cache={tmp_path / 'cache'}", "eval.every=3",
        "eval.holdout=0.3", "eval.sequences=5", "eval.probes=[passkey,recall]",
        "eval.lengths=[130]", "eval.samples=3", save,
    )  # fmt: skip
    worlds[1] |= case("mix", 1, 6, 1, 1, *mix)
    worlds[2] |= case("mix-dp2", 1, 3, 1, 3, *mix)
    worlds[4] |= case("mix-to-cp2", 2, 3, 1, 2, "engine=fsdp", of("mix"), *mix)
    runs = _train_all(tmp_path, worlds)
    assert len(runs) == 39 and len(runs["base"]) == 3
    evaluations = {}
    for name, got in runs.items():
        base = "mix" if name.startswith("mix") else "base"
        _assert_equal(runs[base][-len(got) :], got, name)
        if base == "mix":
            lines = (tmp_path / name / "eval.jsonl").read_text().splitlines()
            found = [json.loads(line) for line in lines]
            assert [x["step"] for x in found] == ([3] if "-to-" in name else [0, 3])
            evaluations[name] = found[-1]
        assert [m["step"] for m in got] == ([3] if "-to-" in name else [1, 2, 3])
    # And fewer ranks continue more.
    smaller = {2: {}, 1: {}}
    smaller[2] |= case("fsdp4-to-2", 1, 3, 1, 2, "engine=fsdp", of("fsdp-cp2"))
    smaller[2] |= case("cp4-to-cp2", 2, 6, 1, 3, of("cp4-zero0"))
    smaller[1] |= case("dp2-to-1", 1, 6, 1, 1, of("fsdp"))
    for name, got in _train_all(tmp_path, smaller).items():
        _assert_equal(runs["base"][-1:], got, name)
    want = evaluations["mix"]
    for got in evaluations.values():
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-4)
        for a, b in zip(want["loss_by_position"], got["loss_by_position"], strict=True):
            assert a["tokens"] == b["tokens"] and b["loss"] == pytest.approx(a["loss"], rel=1e-3)
        assert got["probes"] == want["probes"] and len(want["probes"]) == 10


def test_bf16_is_the_same_at_every_stage(tmp_path, text):
    """DeepSpeed makes a step of its own with bf16 at ZeRO 0: it must not decay, nor count."""
    # So much decay that one hidden step shows.
    keys = ("precision=bf16", "optim.warmup_tokens=0", "train.steps=4", "optim.weight_decay=30")
    cases = {f"zero{s}": _case(tmp_path / f"zero{s}", text, 2, 3, 2, s, *keys) for s in range(4)}
    cases["fp32"] = _case(tmp_path / "fp32", text, 2, 3, 2, 0, *keys, "precision=fp32")
    cases["fsdp"] = _case(tmp_path / "fsdp", text, 2, 3, 2, 3, *keys, "engine=fsdp")
    runs = _train_all(tmp_path, {2: cases})
    for stage in (0, 2, 3):
        _assert_equal(runs["zero1"], runs[f"zero{stage}"], f"zero{stage}", 1e-3)
    _assert_equal(runs["zero1"], runs["fsdp"], "fsdp", 3e-3)
    _assert_equal(runs["fp32"], runs["zero1"], "fp32", 3e-2)


def _job(run_dir, text, *more):
    return [*TINY, text, f"run_dir={run_dir}", "parallel.cp=2", "train.steps=60", *more]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, text):
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    status, output = train(2, *_job(run_dir, text))
    assert status == 0, output
    return [(m["step"], m["loss"], m["grad_norm"]) for m in metrics(run_dir)]


def test_receives_are_posted_before_sends(monkeypatch):
    """Else two ranks of gloo that exchange take turns, twice as long over a slow link."""
    posted = []
    monkeypatch.setattr(dist, "P2POp", lambda op, *arguments, **options: op)
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda ops: posted.extend(ops) or [])
    some = [(torch.zeros(1), 1)] * 2
    ProcessRank(None).start(some, some, "x").wait()
    assert posted == [dist.irecv] * 2 + [dist.isend] * 2


def test_gradients_on_one_rank_only_are_refused_on_all():
    status, output = launch(2, ROOT / "tests/workers/one_wants.py")
    assert status == 0 and output.count("is done") == 2, output


def _resumed(run_dir, text, *more):
    status, output = train(2, *_job(run_dir, text, *more))
    assert status == 0 and "resumed" in output, output
    return [(m["step"], m["loss"], m["grad_norm"]) for m in metrics(run_dir)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_zero_and_resume_changes_nothing(
    tmp_path, text, undisturbed, number
):
    run_dir = tmp_path / "run"
    with Launch(2, ROOT / "train.py", *_job(run_dir, text)) as job:
        file = run_dir / "metrics.jsonl"
        wait_until(lambda: file.exists() and file.read_text().count("\n") > 4, job.process)
        os.kill(job.workers()[1], number)
        status, output = job.finish()
    assert status == 0 and "stopped on request" in output, output
    assert 4 < len(metrics(run_dir)) < 60
    assert _resumed(run_dir, text) == undisturbed


def test_sigkill_of_one_rank_and_resume(tmp_path, text, undisturbed):
    run_dir = tmp_path / "run"
    keys = ("checkpoint.every=3", "engine.zero_stage=1")
    with Launch(2, ROOT / "train.py", *_job(run_dir, text, *keys)) as job:
        wait_until((run_dir / "checkpoints/step_6/ringattn.json").exists, job.process)
        os.kill(job.workers()[0], signal.SIGKILL)
        assert job.finish()[0] != 0
    assert _resumed(run_dir, text, *keys) == undisturbed


def test_another_history_is_set_aside_and_nothing_is_overwritten(tmp_path, text):
    run, listing = tmp_path / "run", tmp_path / "cases.json"

    def train_all(*cases):
        keys = [
            _case(run, text, 1, 1, 1, 1, "checkpoint.every=1", f"train.steps={steps}", *more)
            for steps, *more in cases
        ]
        listing.write_text(json.dumps(keys))
        status, output = launch(1, ROOT / "tests/workers/several_runs.py", str(listing))
        assert status == 0, output

    def contents(folder):
        return sorted(
            p.name for p in folder.iterdir() if not p.name.startswith(("config", "facts", "zero"))
        )

    train_all([3])
    written = (run / "checkpoints/step_3/ringattn.json").stat().st_mtime_ns
    nothing_left_to_do = [3]
    back = [2, f"checkpoint.resume={run}/checkpoints/step_1"]
    train_all(nothing_left_to_do, back, [1, "checkpoint.resume=never"])
    assert contents(run / "superseded_1") == ["metrics.jsonl", "step_2", "step_3"]
    assert (run / "superseded_1/step_3/ringattn.json").stat().st_mtime_ns == written
    assert [m["step"] for m in metrics(run / "superseded_1")] == [1, 2, 3]
    assert contents(run / "superseded_2") == ["metrics.jsonl", "step_1", "step_2"]
    assert [m["step"] for m in metrics(run / "superseded_2")] == [1, 2]
    assert contents(run / "checkpoints") == ["step_1"]
    assert [m["step"] for m in metrics(run)] == [1]


def test_four_processes_make_one_run(tmp_path, text):
    run_dir = tmp_path / "runs" / "one"
    status, output = train(
        4, *TINY, text, f"run_dir={run_dir}", "logger=wandb", "train.steps=2",
        "train.sample_tokens=3", "parallel.cp=2", "precision=bf16", "logger.group=a-group",
        "hardware=h200",
    )  # fmt: skip
    assert status == 0, output
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["one"]
    (sent,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    for fact in (b"a-group", b"H200 SXM", b"exposed exchange", b"versions", b"exchange_s"):
        assert fact in sent.read_bytes()
    assert [m["step"] for m in metrics(run_dir)] == [1, 2]
    assert (run_dir / "config.yaml").is_file()
    for shown in ("resolved plan", "self-check passed", "sample", str(run_dir)):
        assert shown in output
    steps = [m["tokens_seen"] for m in metrics(run_dir)]
    assert all(a < b for a, b in pairwise(steps))
