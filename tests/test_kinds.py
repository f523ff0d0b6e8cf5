"""Layers of several kinds in our decoder and train.py: keys, plans, runs, checkpoints, export."""

import json
from functools import partial

import pytest
import torch

import ringattn as ra
from ringattn import cost
from ringattn.cli import main as cli
from ringattn.context import Strategy
from ringattn.execution.attention import ring_attention
from ringattn.execution.carriers import Counted, VirtualWorld
from ringattn.models import hf_config
from ringattn.models.decoder import Decoder
from ringattn.models.hf_config import UnknownModel, family_of
from ringattn.models.rope_config import RopeConfig
from ringattn.models.sizes import ModelConfig
from ringattn.training import config
from ringattn.training.attention import Attention
from ringattn.training.forecast import on_paper
from ringattn.typed import SettingsError, defaults

from .processes import TINY, train
from .test_hf import MODELS, assert_exported, from_hf, make
from .test_processes import check_every_split

KINDS = 'attention.kinds={local:"sliding_window(16)",global:causal}'
PATTERN = "attention.pattern=[local,local,local,global]"
KEYS = [KINDS, PATTERN, "model.layers=4", "model.sinks=true", "model.softcap=20.0",
        "model.rope_kinds={local:{theta:1000.0}}"]  # fmt: skip
SIZES = {"dim": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn_dim": 48, "vocab_size": 40}


def load_keys(*keys):
    return config.load(["data.root=null", *keys])


def test_keys_of_kinds_become_masks_and_layers():
    run = load_keys(*KEYS, "model.layers=6", "attention.kinds.local=sliding_window(8) | sinks(2)")
    assert run.attention.layers(6) == ("local", "local", "local", "global", "local", "local")
    masks = run.attention.masks([5, 20], 25)
    two = ra.masks.documents([5, 20])
    assert (masks["global"].to_dense() == two.to_dense()).all()
    window = Attention(window=8, sinks=2).build([5, 20], 25)
    assert (masks["local"].to_dense() == window.to_dense()).all()
    assert run.model.rope_of("local").theta == 1000 and run.model.rope_of("global").theta == 1e4


@pytest.mark.parametrize(
    ("keys", "shown"),
    [
        ([KINDS], "attention.kinds and attention.pattern go together"),
        ([PATTERN], "attention.kinds and attention.pattern go together"),
        ([KINDS, "attention.pattern=[local]"], "no layer of kind global"),
        ([KINDS, "attention.pattern=[local,far]"], "'far' is none of the kinds: local, global"),
        ([KINDS, PATTERN, "model.layers=3"], "none would be of kind global"),
        ([KINDS, PATTERN, "attention.window=9"], "leave out attention.mask"),
        ([KINDS, PATTERN, "attention.mask=causal"], "leave out attention.mask"),
        (["attention.kinds={a:7}", "attention.pattern=[a]"], "attention.kinds must be null"),
        (["attention.kinds=causal", "attention.pattern=[a]"], "attention.kinds must be null"),
        (['attention.kinds={a:"block(2)"}', "attention.pattern=[a]"], "kinds.a='block(2)'"),
        (["attention.kind=[a]"], "did you mean: attention.kinds"),
        (["lr=0.1"], "did you mean: optim.lr?"),
        ([*KEYS, "model.rope_kinds={far:{theta:2.0}}"], "no layer is of kind far"),
        ([*KEYS, "model.rope_kinds={local:{thet:2.0}}"], "model.rope_kinds must be null"),
        ([*KEYS, "model.qk_norm=true", "model.qk_norm_whole=true"], "give one"),
    ],
    ids=lambda x: x[-1][:40] if isinstance(x, list) else "",
)  # fmt: skip
def test_what_does_not_fit_is_one_line(keys, shown):
    with pytest.raises(SettingsError) as error:
        load_keys(*keys)
    assert shown in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_pattern_is_that_of_one_rank_and_each_layer_moves_its_own_bytes(checkpoint):
    """Outputs and gradients of a split model beside the model on one rank; with "direct" a layer
    with a window receives its window and no more."""
    n, cp, kinds = 96, 4, ("local", "local", "local", "global")
    sizes = ModelConfig(
        layers=4, **SIZES, sinks=True, softcap=5.0, logit_softcap=4.0, norms="sandwich",
        norm_offset=True, rope_kinds={"local": RopeConfig(theta=100.0)},
    )  # fmt: skip
    masks = {"local": ra.masks.sliding_window(n, 7), "global": ra.masks.causal(n)}
    tokens = torch.randint(40, (1, n), generator=torch.Generator().manual_seed(0))
    model = Decoder(sizes, 3, None, kinds)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))

    def run(rank, plans):
        own = Decoder(sizes, None, None, kinds)
        own.load_state_dict(model.state_dict())
        counted = {kind: Counted(rank) for kind in plans}
        attend = {
            kind: partial(ring_attention, plan=plan, group=counted[kind])
            for kind, plan in plans.items()
        }
        at = torch.from_numpy(plans.layout.positions(rank.rank))
        loss, *_ = own(tokens[:, at], at, attend, tokens[:, at])
        loss.backward()
        bytes_ = {kind: counted[kind].received for kind in plans}
        return loss.detach(), {k: p.grad for k, p in own.named_parameters()}, bytes_

    def world(cp):
        plans = Strategy(cp, "contiguous", "direct").plans(masks, kinds)
        results = VirtualWorld(cp, 60).run(lambda rank: run(rank, plans))
        losses, grads, bytes_ = zip(*results, strict=True)
        return plans, sum(losses), {k: sum(g[k] for g in grads) for k in grads[0]}, bytes_

    _, want, want_grads, _ = world(1)
    plans, loss, grads, bytes_ = world(cp)
    assert loss == pytest.approx(float(want), rel=1e-5)
    for name, grad in want_grads.items():
        assert (grads[name] - grad).norm() <= 1e-4 * grad.norm(), name
    shape = cost.AttentionShape(4, 2, 8, itemsize=4)
    for rank in range(cp):
        for kind, plan in plans.items():
            each = cost.received(plan, rank, shape)
            assert bytes_[rank][kind] == kinds.count(kind) * (each.forward + each.backward)
        assert plans["local"].recv_tokens(rank) == (6 if rank else 0)


def test_runs_with_a_pattern_are_equal_for_every_split_and_resume_across(tmp_path, text):
    """3 local : 1 global, sinks, softcap, two RoPE bases: 1 to 4 ranks, both engines."""

    def case(name, *more):
        return [*TINY, text, *KEYS, f"run_dir={tmp_path / name}", "train.steps=3", *more]

    check_every_split(tmp_path, case)
    facts = json.loads((tmp_path / "two/facts.json").read_text())["plan"]
    assert facts["kinds"]["local"]["layers"] == 3 and facts["kinds"]["global"]["layers"] == 1
    assert facts["area"] < facts["kinds"]["global"]["area"]


def test_another_pattern_does_not_continue_a_checkpoint(tmp_path, text):
    keys = [*TINY, text, *KEYS, "train.steps=1", "checkpoint.every=1", f"run_dir={tmp_path / 'a'}"]
    status, output = train(2, *keys)
    assert status == 0, output
    other = [*keys, "attention.pattern=[local,global]", "train.steps=2"]
    status, output = train(1, *other)
    assert status == 2 and "holds another model: attention.pattern" in output


def test_a_forecast_sums_over_the_kinds():
    keys = ["model=small", "hardware=h100", "precision=bf16", "seq_len=65536", "parallel.cp=8",
            "parallel.node_size=8", "attention=causal"]  # fmt: skip
    mixed = [*keys, PATTERN, 'attention.kinds={local:"sliding_window(1024)",global:causal}']
    ahead = {
        name: on_paper(load_keys(*more), 8)
        for name, more in (
            ("mixed", mixed),
            ("local", [*keys, "attention.window=1024"]),
            ("global", keys),
        )
    }
    for value in (
        lambda x: x.flops,
        lambda x: x.step.parts["attention kernel"],
        lambda x: x.step.received["attention forward"],
        lambda x: x.step.executed["attention"],
    ):
        mixed, local, whole = (value(ahead[name]) for name in ("mixed", "local", "global"))
        assert mixed == pytest.approx(0.75 * local + 0.25 * whole, rel=1e-6)
    assert ahead["mixed"].memory.device <= max(x.memory.device for x in ahead.values())


def test_a_family_with_kinds_is_trained_exported_and_loaded_again(tmp_path, text):
    output = from_hf("gemma3", tmp_path, text, "engine=fsdp")
    assert "of each document: sliding_window(7)" in output
    export = [f"checkpoint={tmp_path / 'run'}", f"out={tmp_path / 'out'}", "dtype=float32"]
    assert cli(["export", *export]) == 0
    assert_exported(tmp_path / "out")


@pytest.mark.parametrize("name", [name for name in MODELS if name != "llama-linear"])
def test_what_is_read_is_written_alike(tmp_path, name):
    """config.json to our settings and back: the same settings, and the same model_type."""
    make(MODELS[name], tmp_path)
    model, layers = hf_config.read(tmp_path)
    kinds = tuple((layers.pattern or ["all"])[i % len(layers.pattern or ["all"])] for i in range(3))
    masks = [layers.masks.get(kind, "causal") for kind in kinds]
    whole = defaults(ModelConfig) | model
    out = tmp_path / "out"
    out.mkdir()
    hf_config.write(out, whole, masks, kinds, 64, "float32")
    assert json.loads((out / "config.json").read_text())["model_type"] == MODELS[name].model_type
    again, same = hf_config.read(out)
    assert same == layers and again == model


@pytest.mark.parametrize(
    ("change", "masks", "shown"),
    [
        ({"sinks": True}, ["causal"], "model.sinks=True alone"),
        ({"softcap": 5.0}, ["causal"], "model.softcap has no place in a config of Llama"),
        ({}, ["causal", "sliding_window(4)"], "layers of Llama|layers of Mistral"),
        ({}, ["sliding_window(3)", "sliding_window(4)"], "windows of several sizes"),
        ({}, ["sliding_window(3) | sinks(1)"], "has no place in a Hugging Face config"),
        ({"rope_kinds": {"local": {}}}, ["causal"], "model.rope_kinds has no place"),
    ],
)
def test_what_no_family_has_is_not_exported(change, masks, shown):
    model = defaults(ModelConfig) | SIZES | {"layers": len(masks)} | change
    with pytest.raises(UnknownModel, match=shown):
        family_of(model, masks)


def test_the_plan_of_kinds_as_a_table_json_and_a_picture(tmp_path, capsys):
    kinds = ["kinds=local: sliding_window(16); global: causal", "n=256", "world=4"]
    keys = ["plan", *kinds, "pattern=local,local,local,global", "layout=balanced"]
    assert cli([*keys, "--check", "--plot", str(tmp_path / "plan.png")]) == 0
    shown = capsys.readouterr().out
    assert "3 layers of kind local: " in shown and "all 4 layers: largest work / mean" in shown
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    assert cli([*keys, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    local, whole = (facts["kinds"][kind]["ranks"] for kind in ("local", "global"))
    work = [3 * a["area"] + b["area"] for a, b in zip(local, whole, strict=True)]
    assert facts["imbalance"] == pytest.approx(max(work) * 4 / sum(work))
    assert len(facts["layers"]) == 4
    for wrong, said in (
        (["pattern=local"], "pattern needs kinds"),
        (["kinds=causal"], "'causal' is not NAME: MASK"),
        ([kinds[0], "pattern=local"], "do not have the same names: global"),
        ([*kinds[:2], "layout=striped", "chunk=4"], "only for balanced"),
        (["kinds=a: causal(7); b: causal(8)"], "equal lengths"),
    ):
        assert cli(["plan", *wrong]) == 2
        assert said in capsys.readouterr().err


def test_what_was_chosen_for_each_kind_stays_chosen():
    n, layers = 64, ["local", "global"]
    masks = {"local": ra.masks.sliding_window(n, 8), "global": ra.masks.causal(n)}
    layout = ra.layouts.zigzag(n, 4)
    chosen = ra.LayerPlans(
        {
            "local": ra.make_plan(masks["local"], layout, "direct"),
            "global": ra.make_plan(masks["global"], layout, "ring", ulysses=2),
        },
        layers,
    )
    again = Strategy(4, schedule="auto", heads=4).like(chosen).plans(masks, layers)
    assert {kind: (plan.schedule, plan.ulysses) for kind, plan in again.items()} == {
        "local": ("direct", 1), "global": ("ring", 2)
    }  # fmt: skip
