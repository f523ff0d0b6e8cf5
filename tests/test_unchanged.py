"""``model=transformers``: unchanged modules in train.py, for every split, and out again."""

import dataclasses
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from ringattn.cli import main as cli
from ringattn.data.open_data import open_data
from ringattn.hf.describe import PREFIX, config_of, empty_model
from ringattn.hf.weights import HubWeights
from ringattn.models.hf_config import UnknownModel
from ringattn.planning.layouts import contiguous
from ringattn.training import config
from ringattn.typed import SettingsError

from .processes import ROOT, TINY, launch, metrics, train
from .test_hf_families import COVERED, REFUSED, families
from .test_processes import _assert_equal, _train_all

KEYS = [key for key in TINY if not key.startswith("model.")]


def saved(family, folder, **changes):
    """A random model of the family in several files; its vocabulary holds all bytes."""

    def sizes():
        config = family.config()
        for name, value in ({"vocab_size": 300} | changes).items():
            setattr(config, name, value)
        return config

    model = families.make(dataclasses.replace(family, config=sizes), "eager")
    model.save_pretrained(folder, max_shard_size="60kB")
    return model


@pytest.mark.parametrize("name", ["qwen3-moe", "gemma3", "qwen3-next", "mamba"])
def test_runs_are_equal_for_every_split_and_engine_and_resume_across(name, tmp_path, text):
    """A mixture of experts with its router loss; windows and a global layer, two RoPE bases; gated
    delta rules and short convolutions; a model in which no layer attends."""
    saved(COVERED[name], tmp_path / "model")

    def case(run, *more):
        return [
            *KEYS, text, "model=transformers", f"model.path={tmp_path / 'model'}", "eval.every=3",
            f"eval.root={text.removeprefix('data.root=')}", "eval.sequences=2",
            f"run_dir={tmp_path / run}", "train.steps=3", *more,
        ]  # fmt: skip

    stop = ["train.max_skipped=0", "checkpoint.every=2"]
    runs = _train_all(
        tmp_path,
        {
            1: {"one": case("one", "engine=fsdp")},
            2: {
                "two": case("two", "engine.zero_stage=3", "memory.checkpoint=true"),
                "first": case("first", *stop),
            },
            4: {
                "four": case(
                    "four", "engine=fsdp", "parallel.layout=balanced", "parallel.schedule=direct",
                    "memory.checkpoint=true",
                ),
            },
        },
    )  # fmt: skip
    for other in ("two", "four", "first"):
        _assert_equal(runs["one"], runs[other], other)
        values = [json.loads((tmp_path / x / "eval.jsonl").read_text()) for x in ("one", other)]
        assert values[1]["loss"] == pytest.approx(values[0]["loss"], rel=1e-4)
    if name in ("qwen3-next", "mamba"):
        facts = json.loads((tmp_path / "four/facts.json").read_text())["plan"]["states"]
        (state,) = facts.values()
        assert state["layers"] in (2, 3) and state["received_bytes"]["backward"] > 0
    again = case("again", f"checkpoint.resume={tmp_path / 'first/checkpoints/step_2'}")
    resumed = _train_all(tmp_path, {3: {"again": [*again, "engine=fsdp"]}})["again"]
    _assert_equal(runs["one"][2:], resumed, "resumed on 3 ranks")


def test_what_is_trained_comes_out_as_transformers_writes_it(tmp_path, text):
    before = saved(COVERED["deepseek-v3"], tmp_path / "model")
    keys = [*KEYS, text, "model=transformers", f"model.path={tmp_path / 'model'}", "train.steps=1",
            "checkpoint.every=1", f"run_dir={tmp_path / 'run'}", "optim.warmup_tokens=0",
            "engine.zero_stage=1"]  # fmt: skip
    status, output = train(2, *keys)
    assert status == 0, output
    assert cli(["export", f"checkpoint={tmp_path / 'run'}", f"out={tmp_path / 'out'}",
                "dtype=float32"]) == 0  # fmt: skip
    files = [
        {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
        for folder in (tmp_path / "model", tmp_path / "out")
    ]
    assert files[0].keys() == files[1].keys()
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(after) is type(before)
    first = dict(before.named_parameters())
    moved = [name for name, p in after.named_parameters() if not torch.equal(p, first[name])]
    assert len(moved) > 0.9 * len(first)  # an expert may have had no token
    for (name, a), (_, b) in zip(before.named_buffers(), after.named_buffers(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("name", [n for n, f in COVERED.items() if f.auto is families.CAUSAL])
def test_weights_are_read_run_by_run(name, tmp_path):
    """Bit for bit, whatever transformers makes of the files: experts are stacked from many."""
    model = saved(COVERED[name], tmp_path)
    source = HubWeights(tmp_path, empty_model(config_of(tmp_path)), PREFIX)
    for parameter, p in model.named_parameters():
        flat, cuts = p.detach().flatten(), (0, p.numel() // 3, p.numel() // 2 + 1, p.numel())
        for start, stop in pairwise(cuts):
            got = source.read("weight", PREFIX + parameter, tuple(p.shape), start, stop - start)
            assert torch.equal(got, flat[start:stop]), parameter


def test_weights_that_are_not_the_models_are_named(tmp_path):
    model = saved(COVERED["llama"], tmp_path / "a")
    folder = tmp_path / "a"
    for change, shown in (
        ({"num_hidden_layers": 3}, "has more: 9 weights"),
        ({"num_hidden_layers": 5}, "lacks 9 weights"),
        ({"intermediate_size": 40}, r"is \(48, 32\), not \(40, 32\)"),
    ):
        path = folder / "config.json"
        was = path.read_text()
        path.write_text(json.dumps(json.loads(was) | change))
        with pytest.raises(UnknownModel, match=shown):
            HubWeights(folder, empty_model(config_of(folder)))
        path.write_text(was)
    del model


def test_sizes_and_masks_come_from_the_config(tmp_path):
    saved(COVERED["llama4"], tmp_path)
    keys = ["model=transformers", f"model.path={tmp_path}", "data.root=null"]
    run = config.load(keys)
    assert run.attention.texts == {
        "chunked_attention": "block_local(8)", "full_attention": "causal"
    }  # fmt: skip
    assert run.attention.pattern == ["chunked_attention"] * 3 + ["full_attention"]
    assert run.model.active < run.model.parameters == run.model.total
    for more, shown in (
        (["model.dim=64"], "model.dim=64: with model=transformers it is what"),
        (["model.rope.type=yarn"], "model.rope={'type': 'yarn'}"),
        (["attention.mask=causal"], "the masks are the model's own"),
        (["attention.window=null"], "the masks are the model's own"),
        (["memory.ffn_tile=8"], "memory.ffn_tile=8"),
        (["model.path=/nowhere"], "model.path=/nowhere"),
    ):
        with pytest.raises(SettingsError) as error:
            config.resolved(config.load([*keys, *more]), 2)
        assert shown in str(error.value), more


@pytest.mark.parametrize("name", ["rwkv", "t5"])
def test_what_is_not_covered_is_one_line_before_anything_starts(name, tmp_path, text):
    family = REFUSED[name]
    family.config().save_pretrained(tmp_path)
    keys = [*KEYS, text, "model=transformers", f"model.path={tmp_path}"]
    status, output = train(1, *keys)
    assert status == 2 and "train.py: model.path: " in output, output
    assert not Path("runs").exists() or "Traceback" not in output


def test_a_router_loss_is_in_the_metrics(tmp_path, text):
    """The loss of the metrics is transformers' own: text and router."""
    model = saved(COVERED["qwen3-moe"], tmp_path / "model").eval()
    keys = [*KEYS, text, "model=transformers", f"model.path={tmp_path / 'model'}", "train.steps=1",
            "attention=causal", f"run_dir={tmp_path / 'run'}"]  # fmt: skip
    status, output = train(2, *keys)
    assert status == 0, output
    (line,) = metrics(tmp_path / "run")
    run = config.load(keys)
    stream = open_data(run.data, run.seq_len, run.seed, lambda *_: None).train
    spans = stream.batch_spans([0])
    local = stream.local(spans, contiguous(97, 1), 0)
    tokens, labels = (torch.from_numpy(x)[None] for x in (local.tokens, local.labels))
    with torch.no_grad():
        out = model(input_ids=tokens, labels=labels, shift_labels=labels, use_cache=False)
    assert line["loss"] == pytest.approx(float(out.loss), rel=1e-4)
    assert line["router_loss"] == pytest.approx(0.1 * float(out.aux_loss), rel=1e-4)


def test_buffers_are_not_cast(tmp_path):
    saved(COVERED["gemma3"], tmp_path)
    status, output = launch(1, ROOT / "tests/workers/buffers.py", str(tmp_path))
    assert status == 0, output


def test_another_config_json_does_not_continue_a_checkpoint(tmp_path, text):
    """Of the same sizes: only the base of RoPE is another one."""
    saved(COVERED["llama"], tmp_path / "model")
    keys = [*KEYS, text, "model=transformers", f"model.path={tmp_path / 'model'}", "train.steps=1",
            "checkpoint.every=1", f"run_dir={tmp_path / 'run'}"]  # fmt: skip
    status, output = train(1, *keys)
    assert status == 0, output
    path = tmp_path / "model/config.json"
    keys_of = json.loads(path.read_text())
    keys_of["rope_parameters"]["rope_theta"] = 123.0
    path.write_text(json.dumps(keys_of))
    status, output = train(1, *keys, "train.steps=2")
    assert status == 2 and "holds another model: model.unchanged" in output, output


def test_no_rank_holds_the_whole_model_while_it_is_loaded():
    """Of four ranks none grows by more than 1.3 x (a quarter of the weights + the largest)."""
    status, output = launch(4, ROOT / "benchmarks/loading.py", "400")
    assert status == 0, output
    ((size, ratio),) = re.findall(r"load (\d+) MiB.*MiB, ([\d.]+) x its part", output)
    assert int(size) > 380 and float(ratio) < 1.3, output
