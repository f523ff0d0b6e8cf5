"""Kinds of layer that attend chosen or summarised keys, in our decoder and train.py: keys, sizes,
splits, runs, forecast."""

import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import ringattn as ra
from ringattn.cli import main as cli
from ringattn.context import Strategy, check_engaged
from ringattn.execution.attention import ring_attention
from ringattn.execution.carriers import Counted, VirtualWorld
from ringattn.mixers import low_rank, span
from ringattn.models.choosing import Choosing
from ringattn.models.decoder import Decoder, shapes
from ringattn.models.key_sets import NAMES, KeySets
from ringattn.models.sizes import MixedConfig, ModelConfig
from ringattn.training import config
from ringattn.training.forecast import on_paper
from ringattn.typed import SettingsError

from .processes import TINY
from .test_processes import _assert_equal, check_every_split

union = sys.modules["ringattn.mixers.union"]  # not the function of that name
SIZES = {"dim": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn_dim": 48, "vocab_size": 40}
SMALL = {
    "pooled": {"block": 4},
    "moba": {"block": 4, "top_k": 3},
    "nsa": {"block": 4, "top_k": 5, "window": 6},
    "hashed": {"block": 4, "buckets": 4},
    "scatterbrain": {"block": 4, "features": 64},
    "adaptive_span": {"window": 20, "ramp": 3},
}


def sizes_of(mixer, layers=("sets", "global"), **more):
    base = ModelConfig(layers=len(layers), **SIZES)
    fields = {name: getattr(base, name) for name in base.__dataclass_fields__}
    sets = KeySets(mixer=mixer, **SMALL[mixer] | more)
    return MixedConfig(**fields, kinds=layers, mixers={"sets": sets})


def along_of(own, group):
    return {"sets": own.sets, "blocks": own.blocks, "group": group, "kernel": "auto"}


def load_keys(*keys):
    return config.load(["data.root=null", *keys])


CASES = [(name, {}) for name in NAMES] + [
    ("pooled", {"how": "learned", "near": 2, "levels": 2, "ratio": 2}),
]


@pytest.mark.parametrize(("name", "more"), CASES)
def test_parameters_are_counted_without_making_them(name, more):
    sizes = sizes_of(name, **more)
    made = shapes(sizes)
    assert sizes.parameters == sum(map(math.prod, made.values()))
    matrices = sum(math.prod(shape) for shape in made.values() if len(shape) > 1)
    assert sizes.matmul_parameters == matrices  # the head is tied


def _on_ranks(model, layout, cp, lengths, tokens, ulysses=1):
    """(loss, gradients, plans) of the decoder on virtual ranks."""
    kinds = model.config.kinds
    attending = {"global": ra.masks.documents(lengths)} if "global" in kinds else {}
    sets = {"sets": model.config.sets_of("sets")}
    strategy = Strategy(cp, layout, ulysses=ulysses, heads=4, kv_heads=2, sets=sets)
    plans = strategy.plans(attending, kinds, {"sets": lengths})

    def run(rank):
        own = Decoder(model.config, None)
        own.load_state_dict(model.state_dict())
        attend = {"global": lambda q, k, v, **more: ring_attention(q, k, v, plans["global"], rank)}
        attend["sets"] = along_of(plans.sets["sets"], Counted(rank))
        at = torch.from_numpy(plans.layout.positions(rank.rank))
        loss, *_ = own(tokens[:, at], at, attend, tokens.roll(-1, 1)[:, at])
        loss.backward()
        return loss.detach(), {k: p.grad for k, p in own.named_parameters()}

    losses, grads = zip(*VirtualWorld(cp, 60).run(run), strict=True)
    return sum(losses), {k: sum(g[k] for g in grads) for k in grads[0]}, plans


@pytest.mark.parametrize(("name", "more"), CASES)
def test_a_split_decoder_is_that_of_one_rank(name, more):
    """Packed documents, zigzag and balanced, 3 and 4 ranks, heads split: loss and gradients."""
    lengths = [50, 3, 40, 27]
    tokens = torch.randint(40, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    model = Decoder(sizes_of(name, ("sets", "global", "sets"), **more), 3)
    want, want_grads, _ = _on_ranks(model, "zigzag", 1, lengths, tokens)
    for layout, cp, ulysses in (("zigzag", 3, 1), ("balanced", 4, 2)):
        loss, grads, _ = _on_ranks(model, layout, cp, lengths, tokens, ulysses)
        assert loss == pytest.approx(float(want), rel=1e-5)
        for key, grad in want_grads.items():
            assert (grads[key] - grad).norm() <= 1e-4 * grad.norm() + 1e-6, key


@pytest.mark.parametrize(("name", "more"), CASES)
def test_a_layer_attends_what_it_forecasts(name, more, monkeypatch):
    """The masks of a call, of tokens and of summaries, are those of its plans; a choice has as many
    pairs as its stand-in, of all heads together."""
    lengths = [37, 20]
    layout = ra.layouts.zigzag(57, 3)
    sets = KeySets(mixer=name, **SMALL[name] | more)
    ahead = sets.plans(layout, lengths)
    fresh = replace(ahead, blocks=sets.blocks(layout, lengths))
    x = torch.randn(1, 57, 32)
    q, k, v = (torch.randn(1, 57, heads, 8) for heads in (4, 2, 2))
    module = Choosing(ModelConfig(layers=1, **SIZES), sets)
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, 1.0)  # spans at their longest
    known = {part: plan.mask for part, plan in ahead.plans.items() if part != "chosen"}
    executed, chosen, combine = {}, {}, union.combine

    def heard(q, parts, states, *rest):
        for part in parts:
            mask = part.plan.mask
            (executed if part.rows is None else chosen)[hash(mask)] = mask
        return combine(q, parts, states, *rest)

    for room in (union, span, low_rank):
        monkeypatch.setattr(room, "combine", heard)

    def work(rank):
        own = [layout.shard(y, rank.rank) for y in (x, q, k, v)]
        return module(*own, along_of(fresh, rank))

    VirtualWorld(3, 60).run(work)
    if name == "hashed":  # by bucket: no pairs beyond those of the own chunk and the one before
        assert all(mask.area <= 4 * known["round 1"].area for mask in chosen.values())
        return
    wanted = {hash(mask): part for part, mask in known.items()}
    if name == "adaptive_span":  # the probe for the gradient of the spans beside them
        executed.pop(hash(ahead.blocks.back(21, 23)))
    assert {*executed} == {*wanted}, [wanted.get(x) for x in {*executed} ^ {*wanted}]
    assert bool(chosen) == ("chosen" in ahead.plans)
    copies = {"moba": 4, "nsa": 2}.get(name)
    for mask in chosen.values():
        assert mask.area == copies * ahead.plans["chosen"].mask.area


def _check(sizes, forward):
    """The self-check of one rank."""
    strategy = Strategy(1, "contiguous", heads=4, kv_heads=2, sets={"sets": sizes.mixers["sets"]})

    def attend(plans):
        return {"sets": along_of(plans.sets["sets"], None)}

    context = SimpleNamespace(
        cp=1, cp_rank=0, device=torch.device("cpu"), total=lambda *x: list(x), attend=attend
    )
    check_engaged(context, strategy, forward, 40, (), ("sets",))


@pytest.mark.parametrize(
    ("name", "more"), [*CASES, ("pooled", {"near": 3}), ("moba", {"top_k": 2})]
)
def test_the_self_check_reaches_summaries_and_choices(name, more, monkeypatch):
    """A layer that drops all sets but its near tokens is found, though those are neighbours; one
    that returns nothing too."""
    sizes = sizes_of(name, ("sets",), **more)
    model = Decoder(sizes, 0)

    def forward(tokens, positions, attend):
        return model(tokens, positions, attend)

    _check(sizes, forward)
    combine = union.combine

    def dropped(q, parts, states, *rest):
        near = [x for x in parts if x.rows is None and x.plan.key_layout is x.plan.layout]
        if not near or (states and name == "scatterbrain"):
            out = combine(q, near or parts, (), *rest)
            zero = not near
            return (0 * out[0], out[1]) if isinstance(out, tuple) else 0 * out if zero else out
        return combine(q, near, states, *rest)

    if name != "adaptive_span":  # which has near tokens only
        with monkeypatch.context() as patch:
            for room in (union, low_rank):
                patch.setattr(room, "combine", dropped)
            with pytest.raises(RuntimeError, match="self-check failed"):
                _check(sizes, forward)
    with monkeypatch.context() as patch:
        patch.setattr(Choosing, "forward", lambda self, x, q, k, v, along, scale=None: 0 * q)
        with pytest.raises(RuntimeError, match="self-check failed"):
            _check(sizes, forward)


def test_runs_are_equal_for_every_split_and_resume_across(tmp_path, text):
    """MoBA, pooled with learned summaries, NSA and full attention in one model: 1 to 4 ranks, both
    engines."""
    kinds = (
        "{routed:{mixer:moba,block:8,top_k:3},far:{mixer:pooled,block:8,how:learned,levels:2},"
        "native:{mixer:nsa,block:8,top_k:4,window:12},global:causal}"
    )
    tiny = [key for key in TINY if not key.startswith("model.layers")]

    def case(name, *more):
        keys = [*tiny, text, "model.layers=4", f"run_dir={tmp_path / name}", "train.steps=3"]
        pattern = "attention.pattern=[routed,far,native,global]"
        return [*keys, f"attention.kinds={kinds}", pattern, *more]

    other = [
        "attention.kinds={buckets:{mixer:hashed,block:16,buckets:4},span:{mixer:adaptive_span,"
        "window:9,ramp:4},both:{mixer:scatterbrain,block:8,features:32}}",
        "attention.pattern=[buckets,span,both]", "model.layers=3",
    ]  # fmt: skip
    runs = check_every_split(
        tmp_path,
        case,
        world_1={"other": case("other", *other)},
        world_2={"other2": case("other2", *other, "memory.checkpoint=true")},
    )
    _assert_equal(runs["other"], runs["other2"], "no layer attends a mask")
    facts = json.loads((tmp_path / "two/facts.json").read_text())["plan"]
    assert facts["sets"]["routed"]["top_k"] == 3 and facts["kinds"]["routed: chosen"]["area"] > 0
    export = [f"checkpoint={tmp_path / 'first'}", f"out={tmp_path / 'out'}"]
    assert cli(["export", *export]) == 2


@pytest.mark.parametrize(
    ("keys", "shown"),
    [
        (["attention.kinds={a:{mixer:mobe}}"], "its names: pooled, moba"),
        (["attention.kinds={a:{mixer:moba,topk:2}}"], "attention.kinds must be null"),
        (["attention.kinds={a:{mixer:hashed,buckets:3}}"], "attention.kinds must be null"),
        (["attention.kinds={a:{mixer:moba,window:3}}"], "attention.kinds must be null"),
        (["attention.kinds={a:{mixer:nsa,top_k:2}}"], "attention.kinds must be null"),
        (["attention.kinds={a:{mixer:moba}}", "parallel.layout=striped"], "on all ranks"),
        (["attention.kinds={a:{mixer:moba}}", "model.softcap=30.0"], "neither model.softcap"),
        (["attention.kinds={a:{mixer:nsa}}", "model.sinks=true"], "nor model.sinks"),
    ],
)
def test_what_does_not_fit_is_one_line(keys, shown):
    with pytest.raises(SettingsError) as error:
        load_keys("attention.pattern=[a]", *keys)
    assert shown in str(error.value) and "\n" not in str(error.value)


def test_families_are_forecast_beside_each_other():
    """At 1M tokens on 64 ranks: attention of fewer pairs takes less, and more is received where
    blocks are chosen from anywhere than where summaries stand for them."""
    steps = {}
    for name, keys in (
        ("full", []),
        ("pooled", ["attention.kinds={a:{mixer:pooled,block:256}}", "attention.pattern=[a]"]),
        ("moba", ["attention.kinds={a:{mixer:moba,block:512}}", "attention.pattern=[a]"]),
    ):
        run = load_keys("model=8b", "seq_len=1048576", "precision=bf16", "parallel.cp=64",
                        "parallel.schedule=direct", "engine=fsdp", "memory=long",
                        "hardware=h100", *keys)  # fmt: skip
        steps[name] = on_paper(config.resolved(run, 64), 64).step
    kernel = {name: step.parts["attention kernel"] for name, step in steps.items()}
    assert kernel["pooled"] < kernel["full"] / 10 and kernel["moba"] < kernel["full"] / 10
    received = {name: step.received["attention forward"] for name, step in steps.items()}
    assert received["pooled"] < received["moba"] < received["full"]
    assert steps["moba"].received["states"] > 0  # the summaries that every rank looks through
    assert steps["moba"].flops < steps["full"].flops


def test_families_side_by_side(capsys, tmp_path):
    from ringattn.cli.families import FAMILIES

    keys = ["model=tiny", "seq_len=16384", "ranks=4", "parallel.cp=4"]
    picture = tmp_path / "families.png"
    assert cli(["estimate", *keys, "--families", "--json", "--plot", str(picture)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ranks"] == 4 and set(found["families"]) == set(FAMILIES)
    for own in found["families"].values():
        assert own["layer_ms"] > 0 and own["peak_memory_bytes"] > 0
    received = {name: own["received_bytes"] for name, own in found["families"].items()}
    assert 0 < received["pooled, 3 levels from 128"] < received["causal"]
    assert picture.stat().st_size > 1000
    assert cli(["estimate", *keys, "attention.window=8", "--families"]) == 2


def test_spans_begin_with_half_and_learn():
    """Shares of the longest span: a few steps of the usual learning rate move them by tokens."""
    sizes = sizes_of("adaptive_span", ("global", "sets"), window=40)
    model = Decoder(sizes, 0)
    spans = model.layers[1].self_attn.choosing.spans
    assert (spans == 0.5).all()
    tokens = torch.randint(40, (1, 60), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(20):
        _, grads, _ = _on_ranks(model, "zigzag", 2, [60], tokens)
        for key, parameter in model.named_parameters():
            parameter.grad = grads[key]
        optimizer.step()
    assert (40 * (spans - 0.5)).abs().max() > 1


def test_layers_have_rotations_of_their_own():
    sizes = sizes_of("hashed", ("sets", "sets"))
    numbers = [layer.self_attn.choosing.number for layer in Decoder(sizes, 0).layers]
    assert numbers == [0, 1]
