"""``model.lora``: adapters beside frozen weights, for every split, beside peft's own loop."""

import importlib.util
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import ringattn as ra
from ringattn.cli import main as cli
from ringattn.data.open_data import open_data
from ringattn.hf.describe import PREFIX, config_of, empty_model, sizes
from ringattn.hf.lora import adapt, adapted, check_used, fingerprint, initial, is_adapter
from ringattn.models.lora_config import Lora
from ringattn.planning.layouts import contiguous
from ringattn.training import config
from ringattn.training.checkpoints.states import Saved
from ringattn.training.engines import ENGINES
from ringattn.training.optimizer import Schedule
from ringattn.typed import SettingsError

from .processes import train
from .test_hf_families import COVERED, LENGTHS, families
from .test_processes import _assert_equal, _train_all
from .test_unchanged import KEYS, saved

LORA = ["model.lora.rank=4", "model.lora.alpha=12.0", "optim.warmup_tokens=0", "optim.lr=0.01"]


def keys(tmp_path, text, run, *more):
    return [
        *KEYS, text, "model=transformers", f"model.path={tmp_path / 'model'}", *LORA,
        f"run_dir={tmp_path / run}", "train.steps=3", *more,
    ]  # fmt: skip


def by_peft(arguments):
    """Losses and norms of peft's own model in a plain loop of torch."""
    run = config.load(arguments)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        run.model.path, dtype=torch.float32, attn_implementation="eager"
    )
    wanted = run.model.lora.targets or "all-linear"
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=12, target_modules=wanted))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(initial(run.seed, PREFIX + name.removeprefix("base_model.model."), p.shape))
    optimizer = torch.optim.AdamW(trained.values(), betas=(0.9, 0.95), weight_decay=0.1)
    stream = open_data(run.data, run.seq_len, run.seed, lambda *_: None).train
    lines = []
    for step in range(3):
        local = stream.local(stream.batch_spans([step]), contiguous(97, 1), 0)
        ids, labels = (torch.from_numpy(x)[None] for x in (local.tokens, local.labels))
        out = model(input_ids=ids, labels=labels, shift_labels=labels, use_cache=False)
        optimizer.param_groups[0]["lr"] = Schedule.of(run.optim, 3 * 97).rate(97 * step)
        optimizer.zero_grad()
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        lines.append((float(out.loss), float(norm)))
    return lines


def test_runs_are_those_of_peft_for_every_split_and_engine(tmp_path, text):
    """Also where there is a router loss, in bf16, and resumed on other ranks."""
    saved(COVERED["gemma3"], tmp_path / "model")
    saved(COVERED["qwen3-moe"], tmp_path / "experts")
    causal = "attention=causal"
    of_experts = [f"model.path={tmp_path / 'experts'}", "model.lora.targets=[q_proj,v_proj,o_proj]"]

    def case(run, *more):
        return {run: keys(tmp_path, text, run, causal, *more)}

    def experts(run, *more):
        return case(run, *of_experts, *more)

    def half(run, *more):
        return case(run, "precision=bf16", *more)

    again = f"checkpoint.resume={tmp_path / 'first/checkpoints/step_2'}"
    kept = "memory.checkpoint=true"
    worlds = {
        1: case("one", "engine=fsdp") | experts("experts-one", "engine.zero_stage=1"),
        2: case("first", "train.max_skipped=0", "checkpoint.every=2")
        | case("zero0", "engine.zero_stage=0")
        | case("zero2", "engine.zero_stage=2")
        | case("zero3", "engine.zero_stage=3", kept)
        | experts("experts-zero3", "engine.zero_stage=3")
        | half("half-zero0", "engine.zero_stage=0")
        | half("half-zero1", "engine.zero_stage=1")
        | half("half-zero3", "engine.zero_stage=3")
        | half("half-fsdp", "engine=fsdp"),
        4: case("four", "engine=fsdp", "parallel.layout=balanced", "parallel.schedule=direct", kept)
        | experts("experts-four", "engine=fsdp", "parallel.layout=balanced"),
        3: case("again-fsdp", again, "engine=fsdp", "engine.zero_stage=2")
        | case("again-zero3", again, "engine.zero_stage=3"),
    }
    runs = _train_all(tmp_path, worlds)
    for name, got in runs.items():
        want = runs["experts-one" if "experts" in name else "one"]
        if "half" in name:
            _assert_equal(want[:2], got[:2], name, tolerance=0.02)
        else:
            _assert_equal(want[2:] if "again" in name else want, got, name)
    for name, more in (("one", []), ("experts-one", of_experts)):
        alone = by_peft(keys(tmp_path, text, name, causal, *more))
        for line, (loss, norm) in zip(runs[name], alone, strict=True):
            assert line["loss"] == pytest.approx(loss, rel=1e-4), name
            assert line["grad_norm"] == pytest.approx(norm, rel=1e-3), name
    files = sorted((tmp_path / "first/checkpoints/step_2").glob("*.safetensors"))
    with Saved(files) as checkpoint:
        assert checkpoint.names and all(map(is_adapter, checkpoint.names))


def test_adapters_come_out_merged_or_alone(tmp_path, text):
    before = saved(COVERED["gemma3"], tmp_path / "model")
    status, output = train(2, *keys(tmp_path, text, "run", "model.lora.targets=[q_proj,down_proj]",
                                    "engine.zero_stage=3"))  # fmt: skip
    assert status == 0, output
    assert "of which" in output and "are trained" in output

    def out(name, *more):
        arguments = [f"checkpoint={tmp_path / 'run'}", f"out={tmp_path / name}", *more]
        assert cli(["export", *arguments]) == 0
        return tmp_path / name

    merged, alone = out("merged", "dtype=float32"), out("a", "dtype=float32", "lora=adapters")
    after = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    first = dict(before.named_parameters())
    for name, p in after.named_parameters():
        assert torch.equal(p, first[name]) == ("q_proj" not in name and "down_proj" not in name)
    tokens = torch.arange(40)[None] % 61
    with torch.no_grad():
        base, wanted = before(tokens).logits, after(tokens).logits
        theirs = peft.PeftModel.from_pretrained(before, alone)(tokens).logits
    assert float((wanted - base).norm() / base.norm()) > 0.01
    assert torch.allclose(theirs, wanted, atol=1e-4 * float(wanted.abs().max()))
    half = load_file(out("b", "lora=adapters") / "adapter_model.safetensors")
    assert {x.dtype for x in half.values()} == {torch.bfloat16}


def test_frozen_weights_must_be_the_same_again(tmp_path, text, capsys):
    model = saved(COVERED["llama"], tmp_path / "model")
    arguments = keys(tmp_path, text, "run", "checkpoint.every=1", "train.steps=1")
    assert train(1, *arguments)[0] == 0
    for more, shown in (
        (["model.lora.rank=5"], "holds another model: model.lora"),
        (["model.lora.alpha=13.0"], "holds another model: model.lora"),
        (["model.lora.targets=[q_proj]"], "holds another model: model.lora"),
        (["model.lora.rank=0"], "holds another model: model.frozen"),
    ):
        status, output = train(1, *arguments, "train.steps=2", *more)
        assert status == 2 and shown in output, (more, output)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.001)
    shutil.rmtree(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    status, output = train(1, *arguments, "train.steps=2")
    assert status == 2 and "holds another model: model.frozen" in output, output
    assert cli(["export", f"checkpoint={tmp_path / 'run'}", f"out={tmp_path / 'out'}"]) == 2
    assert "has other weights now" in capsys.readouterr().err


def test_a_fingerprint_sees_any_training_of_a_large_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    from safetensors.torch import save_file

    weights = {"a": torch.randn(700, 1000), **{f"norm{i}": torch.randn(3) for i in range(20)}}
    save_file(weights, tmp_path / "model.safetensors")
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    new = weights["a"].clone()
    new[-1] *= 2  # a token that was added
    save_file(weights | {"a": new}, tmp_path / "model.safetensors")
    assert fingerprint(tmp_path) != before
    for name in weights:
        save_file(weights | {name: weights[name] * 1.0001}, tmp_path / "model.safetensors")
        assert fingerprint(tmp_path) != before


@pytest.mark.parametrize(
    ("name", "more", "shown"),
    [
        ("llama", ["model.lora.targets=[q_proj,w1]"], "LlamaForCausalLM has no layer 'w1'"),
        ("llama", ["model.lora.targets=[lm_head]"], "lm_head is a Linear; adapters are for"),
        ("llama", ["model.lora.targets=[embed_tokens]"], "embed_tokens is a Embedding"),
        ("llama", ["model.lora.targets=[norm]"], "model.norm is a LlamaRMSNorm"),
        ("llama", ["model.lora.targets=q_proj"], "model.lora.targets must be null or a list"),
        ("llama", ["model.lora.targets=[]"], "model.lora.targets must be null or a list"),
        ("llama", ["model.lora.rank=-1"], "model.lora.rank must be an integer of at least 0"),
        ("llama", ["model.lora.alpha=0.0"], "model.lora.alpha must be a finite number above 0"),
        ("llama", ["model.adapters=7"], "model.adapters=7: with model=transformers it is what"),
        ("qwen3-moe", ["model.lora.targets=[gate]"], "is a Qwen3MoeTopKRouter"),
        ("qwen3-moe", ["model.lora.targets=[down_proj]"], "experts that are stacked in one weight"),
        ("deepseek-v3", [], "peft takes names of DeepseekV3ForCausalLM for its stacked experts"),
    ],
)  # fmt: skip
def test_what_gets_no_adapter_is_said_at_once(name, more, shown, tmp_path):
    COVERED[name].config().save_pretrained(tmp_path)
    with pytest.raises(SettingsError) as error:
        config.load(["model=transformers", f"model.path={tmp_path}", "model.lora.rank=2", *more])
    assert shown in str(error.value)


def test_our_own_decoder_has_none_and_peft_may_be_missing(tmp_path, monkeypatch):
    with pytest.raises(SettingsError, match=r"model\.lora\.rank=2: adapters are for unchanged"):
        config.load(["model.lora.rank=2"])
    COVERED["llama"].config().save_pretrained(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "peft" else find(name)
    )
    with pytest.raises(SettingsError, match=r"pip install 'ringattn\[lora\]'"):
        config.load(["model=transformers", f"model.path={tmp_path}", "model.lora.rank=2"])


def test_an_adapter_whose_layer_is_passed_by_is_refused():
    model = empty_model(COVERED["llama"].config(), weights=True)
    adapt(model, Lora(rank=2, targets=["q_proj", "v_proj"]))
    layers = adapted(model)
    check_used(model, {layer for path, layer in layers.items() if "layers.0" in path})
    with pytest.raises(ra.hf.NotCovered, match=r"self_attn\.v_proj is never called"):
        check_used(model, {layer for path, layer in layers.items() if "q_proj" in path})


def test_costs_know_what_is_frozen(tmp_path):
    """Gradients, moments and their traffic are the adapters'; weights are all."""
    COVERED["llama"].config().save_pretrained(tmp_path)
    given = ["model=transformers", f"model.path={tmp_path}"]
    plain, run = (config.load([*given, *more]) for more in ([], LORA[:2]))
    model = adapt(empty_model(config_of(tmp_path)), run.model.lora).model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0 < run.model.trained == run.model.adapters == trained
    assert plain.model.trained == plain.model.parameters == run.model.parameters - trained
    assert run.model.matmul_parameters == plain.model.matmul_parameters + trained
    assert sizes(config_of(tmp_path))["adapters"] is None
    frozen = plain.model.matmul_parameters
    assert ra.cost.model.step_flops(run.model, 10, 0) == 10 * (4 * frozen + 6 * trained)
    assert ra.cost.model.step_flops(plain.model, 10, 0) == 10 * 6 * frozen
    for kind in ENGINES:
        states = kind().states(run.model, 4, 2, 2).device
        assert states["optimizer"] == 8 * trained / 2
        assert states["weights"] in (4 * run.model.parameters, 2 * run.model.parameters)
        assert kind().traffic(run.model, 4, 2, 2).optimizer == 40 * trained / 2


def test_peft_in_a_loop_of_ones_own(monkeypatch):
    """peft's wrapper inside of split_sequence: its gradients are those of one process."""
    make = families.make

    def wrapped(family, attention):
        settings = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        model = make(family, attention)
        torch.manual_seed(1)
        return peft.get_peft_model(model, settings)

    monkeypatch.setattr(families, "make", wrapped)
    family = COVERED["gemma3"]
    want = families.in_one_process(family, LENGTHS)
    got = families.split(family, 2, LENGTHS)
    loss, grad, whose = families.errors(got, want)
    assert loss <= 1e-5 and grad <= 2e-4, (loss, grad, whose)
    assert sum(g is not None for g in want[1].values()) == 2 * 7 * 6
