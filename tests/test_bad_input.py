"""One clear line that names the key, before any model is built, and a non-zero exit."""

import json
import math
import os
import re

import pytest
import torch

from ringattn.data.corpus import Corpus
from ringattn.training.launching.world import pick_device
from ringattn.training.main import main
from ringattn.typed import SettingsError

from .processes import ROOT, TINY, metrics, torchrun, train


@pytest.fixture
def refused(monkeypatch, capsys, text, tmp_path):
    """Runs train.py's main in this process as rank 0 of ``world``; returns its one line."""

    def run(*arguments, world=2):
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("LOCAL_RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setattr("ringattn.models.decoder.Decoder.__init__", None)  # never reached
        run_dir = f"run_dir={tmp_path / 'run'}"
        status = main([*TINY, text, run_dir, *arguments])
        error = capsys.readouterr().err
        assert status == 2 and not (tmp_path / "run").exists()
        assert error.count("\n") == 1, error
        return error

    return run


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("seqlen=5", ["seqlen", "seq_len"]),
        ("optim.lrr=5", ["optim.lrr", "optim.lr"]),
        ("model=huge", ["huge", "tiny", "125m"]),
        ("engine=horovod", ["horovod", "deepspeed"]),
        ("seq_len", ["KEY=VALUE"]),
        ("seq_len=-4", ["seq_len", "-4", "at least 1"]),
        ("seq_len=abc", ["seq_len", "abc", "integer"]),
        ("batch_size=0", ["batch_size", "at least 1"]),
        ("train.steps=-1", ["train.steps", "at least 0"]),
        ("checkpoint.every=-1", ["checkpoint.every", "at least 0"]),
        ("precision=fp8", ["precision", "fp8", "fp32, bf16"]),
        ("optim.lr=nan", ["optim.lr", "finite"]),
        ("optim.betas=[1]", ["optim.betas"]),
        ("optim.betas=[0.9,1]", ["optim.betas", "below 1"]),
        ("optim.min_lr_ratio=2", ["optim.min_lr_ratio", "at most 1"]),
        ("+optim.momentum=0.9", ["unknown key 'optim.momentum'", "optim."]),
        ("~optim.clip", ["optim.clip is missing"]),
        ("parallel=null", ["unknown key 'parallel'"]),
        ("train.sample_prompt=null", ["train.sample_prompt must be text"]),
        ("parallel.cp=3", ["parallel.cp=3", "world of 2", "1, 2"]),
        ("parallel.schedule=spiral", ["parallel.schedule", "spiral", "ring"]),
        (
            "parallel.layout=random",
            ["parallel.layout", "random", "contiguous, zigzag, striped, balanced"],
        ),
        ("parallel.ulysses=3", ["parallel.ulysses=3", "2 ranks", "one of: 1, 2"]),
        ("parallel.ulysses=0", ["parallel.ulysses", "at least 1"]),
        ("parallel.node_size=3", ["parallel.node_size=3", "parallel.cp=2", "one of: 1, 2"]),
        ("engine.zero_stage=4", ["engine.zero_stage", "0, 1, 2, 3 with engine=deepspeed; got 4"]),
        ("logger.mode=loud", ["logger.mode"]),
        ("attention.window=0", ["attention.window", "at least 1"]),
        ("attention.name=local", ["attention.name", "documents, causal"]),
        ("model.dim=wide", ["model.dim", "wide"]),
        ("model.tied=7", ["model.tied", "True, False"]),
        ("+model.bias=true", ["unknown key 'model.bias'"]),
        ("data.root=5", ["data.root", "5"]),
        ("data.mix=[{weight:1},{root:a,weight:1}]", ["data.mix", "root", "passkey"]),
        (
            "data.mix=[{format:recall,root:a,weight:1},{root:a,weight:1}]",
            ["data.mix", "in place of a root"],
        ),
        (
            "data.mix=[{format:recall,weight:1},{format:passkey,weight:2}] eval.holdout=0.1 "
            "eval.every=1",
            ["eval.holdout", "no documents to hold out"],
        ),
        (
            "data.mix=[{format:recall,weight:1},{format:recall,weight:2}]",
            ["data.mix", "once"],
        ),
        (
            "data.format=recall data.mix=[{root:a,weight:1},{root:b,weight:2}]",
            ["data.format=recall", "name it in the mix"],
        ),
        (
            "data.mix=[{format:recall,glob:a,weight:1},{root:a,weight:1}]",
            ["data.mix", "in place of a root"],
        ),
        ("train.steps=0", ["train.steps=0", "eval.first=true"]),
        ("eval.first=true", ["eval.first", "eval.every"]),
        ("kernel=cudnn", ["kernel", "cudnn", "aten"]),
        ("kernel=gluon", ["kernel='gluon'", "bfloat16", "triton"]),
        ("model.kv_heads=3", ["model.kv_heads", "heads=4"]),
        ("model.vocab_size=10", ["model.vocab_size", "257"]),
        ("data.root=/nowhere", ["data.root=/nowhere", "not a directory"]),
        ("data.glob=*.nothing", ["data.glob", "*.nothing"]),
        ("checkpoint.resume=/nowhere", ["checkpoint.resume=/nowhere", "no finished checkpoint"]),
        ("engine=fsdp engine.zero_stage=1", ["engine.zero_stage", "2, 3 with engine=fsdp; got 1"]),
        ("engine.shard=context", ["engine.shard", "world with engine=deepspeed"]),
        ("engine.offload_params=true", ["engine.offload_params", "zero_stage=3"]),
        ("engine.zero_stage=0 engine.offload_optimizer=true", ["engine.offload_optimizer"]),
        ("engine=fsdp engine.offload_optimizer=true", ["engine.offload_params=true"]),
        ("memory.offload=true", ["memory.offload", "memory.checkpoint=true"]),
        ("memory.loss=liger", ["memory.loss=liger", "GPU"]),
        ("model.rope.type=yarn", ["model.rope.factor must be given"]),
        ("model.rope.type=yarn model.rope.factor=2", ["model.rope.original_length must be given"]),
        ("model.rope.type=spiral", ["model.rope.type", "yarn, llama3"]),
        ("run_dir=/proc/nowhere", ["run_dir=/proc/nowhere"]),
        (f"data.root=/{'x' * 300}", ["data.root=/xxx", "name too long"]),
        (f"run_dir=/{'x' * 300}", ["run_dir=/xxx", "name too long"]),
        (f"checkpoint.resume=/{'x' * 300}", ["checkpoint.resume=/xxx", "name too long"]),
        ("data.root='~nobody-here/x'", ["data.root=~nobody-here/x", "home directory"]),
        ("run_dir='~nobody-here/x'", ["run_dir=~nobody-here/x", "home directory"]),
        ("checkpoint.resume='~nobody-here/x'", ["checkpoint.resume=~nobody", "home directory"]),
        ("seed=99999999999999999999", ["seed", "below 2**63"]),
        ("parallel.timeout_s=1e30", ["parallel.timeout_s", "at most 1e+06"]),
    ],
)
def test_one_line_names_the_key(refused, override, shown):
    error = refused(*override.split(" "))
    for word in shown:
        assert word in error


def test_a_gpu_that_is_not_there(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "device=cuda: this machine has 0 usable GPUs" in refused("device=cuda")


def test_two_processes_and_one_gpu(monkeypatch):
    """Every process of the machine must come to the same result."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for local_rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert pick_device("auto").type == "cpu"
        with pytest.raises(SettingsError, match="1 usable GPUs for 2 processes"):
            pick_device("cuda")


def test_sending_metrics_needs_a_key(refused, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    error = refused("logger=wandb", "logger.mode=online")
    assert "logger.mode=online" in error and "WANDB_API_KEY" in error


def test_data_files_needs_its_root(refused, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    for group, key in (("data=files", "data.root"), ("data=mix", "data.mix"),
                       ("model=hf", "model.path")):  # fmt: skip
        assert main([group]) == 2
        assert f"{key} must be given" in capsys.readouterr().err


def test_unreadable_and_empty_files(refused, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"")
    assert "no text" in refused(f"data.root={folder}")
    (folder / "loop.txt").symlink_to(folder / "loop.txt")
    assert "loop.txt is a link to" in refused(f"data.root={folder}")
    assert "no text" in refused(f"data.root={folder}", "data.glob=a*")


def test_unreadable_file_is_named(refused, tmp_path, monkeypatch):
    # Permissions do not stop root, so the refusal comes from the file system call itself.
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "secret.txt").write_text("x")
    real = type(folder).open

    def deny(path, *rest, **more):
        if path.name == "secret.txt":
            raise PermissionError(13, "Permission denied")
        return real(path, *rest, **more)

    monkeypatch.setattr(type(folder), "open", deny)
    error = refused(f"data.root={folder}")
    assert "secret.txt" in error and "Permission denied" in error


def test_unreadable_folder_is_named(refused, tmp_path, monkeypatch):
    folder = tmp_path / "text"
    (folder / "secret").mkdir(parents=True)
    (folder / "a.txt").write_text("x")
    real = os.scandir

    def deny(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", deny)
    error = refused(f"data.root={folder}")
    assert "secret" in error and "Permission denied" in error


def test_file_names_may_be_any_bytes(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff.txt", "wb") as file:
        file.write(b"text")
    assert Corpus.open(str(tmp_path), "*.txt").fingerprint


def test_a_run_that_diverges_stops_with_a_line_and_saves_nothing(tmp_path, text):
    run_dir = tmp_path / "run"
    status, output = train(
        2, *TINY, text, f"run_dir={run_dir}", "train.steps=9", "optim.lr=1e30", "optim.clip=0"
    )
    assert status != 0 and "ringattn/training" not in output, output  # no traceback of ours
    (line,) = re.findall(r"train.py: step [0-9]+: loss .*, gradient norm .*", output)
    assert str(run_dir) in line
    assert all(math.isfinite(m["loss"]) for m in metrics(run_dir))
    assert not list(run_dir.glob("checkpoints/*/ringattn.json"))


def test_the_first_process_of_every_machine_speaks(monkeypatch, capsys):
    """The others hold still: tests/test_processes.py."""
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["seq_len=0"]) == 2
    assert "seq_len must be" in capsys.readouterr().err


def test_help_lists_every_group(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for word in ("tiny", "125m", "deepspeed", "wandb", "zero_stage", "parallel"):
        assert word in shown


def test_checkpoint_of_another_model_or_run_is_refused(tmp_path, text, refused):
    run_dir = tmp_path / "first"
    status, output = train(1, *TINY, text, f"run_dir={run_dir}", "train.steps=2")
    assert status == 0, output
    assert len(metrics(run_dir)) == 2
    resume = f"checkpoint.resume={run_dir}"
    assert "model.layers is 2 there and 3 here" in refused(resume, "model.layers=3", world=1)
    assert "seq_len=97" in refused(resume, "seq_len=50", world=1)
    assert "attention.window is None there and 9 here" in refused(
        resume, "attention.window=9", world=1
    )
    assert "precision=fp32" in refused(resume, "precision=bf16", world=1)
    manifest = run_dir / "checkpoints/step_2/ringattn.json"
    content = json.loads(manifest.read_text())
    for damage in ({"step": 2, "format": 2}, content | {"step": "2"}, content | {"model": 5}, [1]):
        manifest.write_text(json.dumps(damage))
        assert "damaged" in refused(resume, world=1)
    manifest.unlink()
    assert "no finished checkpoint" in refused(resume, world=1)


def test_a_bad_key_under_torchrun_exits_with_its_line(text):
    status, output = torchrun(2, ROOT / "train.py", *TINY, text, "parallel.cp=5")
    assert status != 0
    assert output.count("train.py: parallel.cp=5") == 1
    assert 'Traceback (most recent call last):\n  File "train.py' not in output
