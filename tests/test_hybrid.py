"""Layers with a state in our decoder and train.py: keys, sizes, splits, runs, forecast."""

import json
import math
import sys

import pytest
import torch
from torch.nn import functional as F

import ringattn as ra
from ringattn import mixers
from ringattn.cli import main as cli
from ringattn.context import Strategy, check_engaged
from ringattn.cost.model import footprint
from ringattn.execution.attention import ring_attention
from ringattn.execution.carriers import Counted, VirtualWorld
from ringattn.mixers import recurrent
from ringattn.mixers.recurrent import CHUNK, CHUNK_OF_VECTORS
from ringattn.models.decoder import Decoder, shapes
from ringattn.models.mixer import make_mixer
from ringattn.models.mixer_config import Mixer
from ringattn.models.sizes import MixedConfig, ModelConfig
from ringattn.planning.state_exchange import exchange_of
from ringattn.training import config
from ringattn.training.engines.adamw import make_optimizer
from ringattn.training.forecast import on_paper
from ringattn.training.optimizer import Optimizer
from ringattn.typed import SettingsError

from .processes import TINY, train
from .test_processes import _assert_equal, check_every_split

NAMES = ("linear", "lightning", "ssd", "gla", "delta", "gated_delta", "kda", "scan", "conv")
SIZES = {"dim": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn_dim": 48, "vocab_size": 40}
HYBRID = ["model=hybrid-tiny", "model.dim=32", "model.heads=2", "model.head_dim=16",
          "model.ffn_dim=48", "attention.kinds.memory={mixer:gated_delta,key_dim:8}"]  # fmt: skip
TINY_HYBRID = [key for key in TINY if not key.startswith("model.layers")]


def load_keys(*keys):
    return config.load(["data.root=null", *keys])


def sizes_of(mixer, layers=("memory", "global"), **more):
    base = ModelConfig(layers=len(layers), **SIZES)
    kind = Mixer(mixer=mixer, **more).of(base)
    fields = {name: getattr(base, name) for name in base.__dataclass_fields__}
    return MixedConfig(**fields, kinds=layers, mixers={"memory": kind})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("conv", [1, 3])
def test_parameters_are_counted_without_making_them(name, conv):
    sizes = sizes_of(name, conv=conv, heads=3, key_dim=6, value_dim=10)
    made = shapes(sizes)
    assert sizes.parameters == sum(map(math.prod, made.values()))
    matrices = {
        n: s
        for n, s in made.items()
        if len(s) > 1 and not {"conv_weight", "A_log"} & {n.rsplit(".")[-1]}
    }
    assert sizes.matmul_parameters == sum(map(math.prod, matrices.values()))  # the head is tied


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_layer_keeps_and_moves_is_what_it_says(name, dtype, monkeypatch):
    assert (CHUNK, CHUNK_OF_VECTORS) == (64, 16)  # as Mixer counts
    n, model = 512, ModelConfig(layers=1, **SIZES | {"dim": 64})
    for heads, keys, values in ((2, 32, 64), (4, 64, 32)):
        kind = Mixer(mixer=name, heads=heads, key_dim=keys, value_dim=values)
        module = make_mixer(model, kind)
        for p in module.parameters():
            torch.nn.init.uniform_(p, -0.1, 0.1)
        module.to(dtype)
        x = torch.randn(1, n, 64, dtype=dtype, requires_grad=True)
        own = {t.untyped_storage().data_ptr() for t in (x, *module.parameters())}
        saved = {}

        def keep(t, own=own, saved=saved):
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = (storage.nbytes(), t)
            return t

        segments = ra.make_segments(ra.masks.causal(n), ra.layouts.contiguous(n, 1))
        said = []

        def heard(segments, sizes, said=said):
            said.append(sizes)
            return exchange_of(segments, sizes)

        monkeypatch.setattr(recurrent, "exchange_of", heard)
        monkeypatch.setattr(sys.modules["ringattn.mixers.scan"], "exchange_of", heard)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            module(x, {"segments": segments, "group": None})
        assert said == [kind.state_bytes(x.element_size())] * (name != "conv")
        measured = sum(size for size, _ in saved.values()) / n
        assert kind.kept(dtype.itemsize) == pytest.approx(measured, rel=0.03)


def test_decays_of_channels_are_not_pulled_to_one():
    """Mamba-1's A_log is a matrix, and AdamW decays matrices."""
    module = make_mixer(sizes_of("scan"), Mixer(mixer="scan").of(sizes_of("scan")))
    found = {
        name: group["weight_decay"]
        for group in make_optimizer(module, Optimizer(weight_decay=0.1)).param_groups
        for p in group["params"]
        for name, own in module.named_parameters()
        if own is p
    }
    assert found["A_log"] == found["D"] == 0 and found["o_proj.weight"] == 0.1


def _by_definition(m, x):
    """A layer token by token in float64, of its weights: what the docs and papers write."""
    w = {name: p.double() for name, p in m.named_parameters()}
    kind, x = m.kind, x.double()
    qkv = torch.cat([x @ w[f"{name}_proj.weight"].T for name in "qkv"], -1)
    qkv = F.silu(mixers.naive.convolution(qkv, w["conv_weight"]))
    keys = kind.heads * kind.key_dim
    q, k, v = (
        y.unflatten(-1, (kind.heads, -1))
        for y in qkv.split([keys, keys, kind.heads * kind.value_dim], -1)
    )
    decay = beta = None
    out_scale = kind.key_dim**-0.5
    if kind.mixer == "linear":
        q, k = F.elu(q) + 1, F.elu(k) + 1
        weight = mixers.naive.recurrence(q, k, torch.ones_like(v[..., :1]))
        out_scale = 1 / weight
    if kind.mixer == "lightning":  # 1 - 2^-5 for the first head, 1 - 2^-9 for the last
        decay = torch.tensor([1 - 2**-5, 1 - 2**-9]).double().log().expand(*v.shape[:3])
    if kind.mixer in ("ssd", "gated_delta"):
        dt = F.softplus(x @ w["dt_proj.weight"].T + w["dt_bias"])
        decay = -dt * w["A_log"].exp()
    if kind.decays_vectors:
        raw = x @ w["decay_in.weight"].T @ w["decay_out.weight"].T + w["dt_bias"]
        raw = raw.unflatten(-1, (kind.heads, -1))
        gla = F.logsigmoid(raw) / 16
        decay = gla if kind.mixer == "gla" else -w["A_log"].exp()[:, None] * F.softplus(raw)
    if "delta" in kind.mixer or kind.mixer == "kda":
        q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
        beta = (x @ w["beta_proj.weight"].T).sigmoid()
    values = v * dt[..., None] if kind.mixer == "ssd" else v
    out = mixers.naive.recurrence(q, k, values, decay, beta) * out_scale
    if kind.mixer == "ssd":
        out = out + w["D"][:, None] * v
    out = out / (out.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w["out_norm.weight"]
    gate = F.silu(x @ w["gate_proj.weight"].T).unflatten(-1, (kind.heads, -1))
    return (out * gate).flatten(-2) @ w["o_proj.weight"].T


def _selective(m, x):
    """Mamba-1 token by token, as its paper's algorithm has it."""
    w = {name: p.double() for name, p in m.named_parameters()}
    v = F.silu(mixers.naive.convolution(x @ w["v_proj.weight"].T, w["conv_weight"]))
    low, B, C = (v @ w["bc_proj.weight"].T).split([16, m.kind.key_dim, m.kind.key_dim], -1)
    dt = F.softplus(low @ w["dt_proj.weight"].T + w["dt_bias"])
    state, outs = torch.zeros(*v[:, 0].shape, m.kind.key_dim).double(), []
    for t in range(v.shape[1]):
        decay = (-dt[:, t, :, None] * w["A_log"].exp()).exp()
        state = decay * state + (dt[:, t] * v[:, t])[..., None] * B[:, t, None]
        outs.append((state * C[:, t, None]).sum(-1))
    out = torch.stack(outs, 1) + w["D"] * v
    return (out * F.silu(x @ w["gate_proj.weight"].T)) @ w["o_proj.weight"].T


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_is_what_its_source_writes(name):
    model = Decoder(sizes_of(name, heads=2, key_dim=6, value_dim=10), 0)
    module, x = model.layers[0].mixer, torch.randn(1, 70, 32)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn(p.shape))
    segments = ra.make_segments(ra.masks.causal(70), ra.layouts.contiguous(70, 1))
    got = module(x, {"segments": segments, "group": None})
    if name == "conv":
        w = {key: p.double() for key, p in module.named_parameters()}
        before, after, inner = (x.double() @ w["in_proj.weight"].T).chunk(3, -1)
        mixed = mixers.naive.convolution(before * inner, w["conv_weight"])
        want = (after * mixed) @ w["o_proj.weight"].T
    elif name == "scan":
        want = _selective(module, x.double())
    else:
        want = _by_definition(module, x)
    assert (got - want).norm() <= 1e-5 * want.norm()


def _on_ranks(model, layout, cp, lengths, tokens):
    """(loss, gradients, plans, bytes by rank) of the decoder on virtual ranks."""
    n = sum(lengths)
    masks = {"global": ra.masks.documents(lengths)}
    states = {"memory": lengths}
    layers = model.config.kinds
    attending = {k: m for k, m in masks.items() if k in layers}
    plans = Strategy(cp, layout).plans(attending, layers, states)

    def run(rank):
        own = Decoder(model.config, None)
        own.load_state_dict(model.state_dict())
        own.train()
        counted = Counted(rank)
        attend = {
            kind: lambda q, k, v, plan=plan, **more: ring_attention(q, k, v, plan, group=rank)
            for kind, plan in plans.items()
        }
        attend |= {
            kind: {"segments": each, "group": counted} for kind, each in plans.segments.items()
        }
        at = torch.from_numpy(plans.layout.positions(rank.rank))
        loss, *_ = own(tokens[:, at], at, attend, tokens.roll(-1, 1)[:, at])
        loss.backward()
        return loss.detach(), {k: p.grad for k, p in own.named_parameters()}, counted.received

    losses, grads, received = zip(*VirtualWorld(cp, 60).run(run), strict=True)
    assert n == plans.layout.n
    return sum(losses), {k: sum(g[k] for g in grads) for k in grads[0]}, plans, received


@pytest.mark.parametrize("name", NAMES)
def test_a_split_decoder_is_that_of_one_rank_and_moves_what_is_forecast(name):
    """Packed documents, zigzag and balanced, 3 and 4 ranks: loss, gradients, bytes."""
    lengths = [50, 3, 40, 27]
    tokens = torch.randint(40, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    sizes = sizes_of(name, ("memory", "global", "memory"), key_dim=6)
    model = Decoder(sizes, 3)
    want, want_grads, *_ = _on_ranks(model, "zigzag", 1, lengths, tokens)
    for layout, cp in (("zigzag", 3), ("balanced", 4)):
        loss, grads, plans, received = _on_ranks(model, layout, cp, lengths, tokens)
        assert loss == pytest.approx(float(want), rel=1e-5)
        for key, grad in want_grads.items():
            assert (grads[key] - grad).norm() <= 1e-4 * grad.norm() + 1e-6, key
        mixer = sizes.mixer_of("memory")
        for rank in range(cp):
            each = ra.cost.received_states(plans.segments["memory"], rank, mixer, 4)
            assert received[rank] == 2 * (each.forward + each.backward)


def test_runs_of_a_hybrid_are_equal_for_every_split_and_resume_across(tmp_path, text):
    """3 gated delta : 1 global, packed documents: 1 to 4 ranks, both engines."""

    def case(name, *more):
        keys = [*TINY_HYBRID, text, *HYBRID, "model.layers=4", f"run_dir={tmp_path / name}"]
        return [*keys, "train.steps=3", *more]

    pure = ["attention.kinds={memory:{mixer:ssd,heads:3}}", "attention.pattern=[memory]"]
    runs = check_every_split(
        tmp_path,
        case,
        world_1={"pure": case("pure", *pure)},
        world_2={"pure2": case("pure2", *pure, "memory.checkpoint=true")},
    )
    _assert_equal(runs["pure"], runs["pure2"], "no layer attends")
    facts = json.loads((tmp_path / "two/facts.json").read_text())["plan"]
    assert facts["states"]["memory"]["layers"] == 3 and facts["kinds"]["global"]["layers"] == 1
    assert facts["states"]["memory"]["received_bytes"]["forward"] > 0
    status, output = train(1, *case("first", "attention.kinds.memory.heads=1"))
    assert status == 2 and "holds another model: attention.kinds" in output
    export = [f"checkpoint={tmp_path / 'first'}", f"out={tmp_path / 'out'}"]
    assert cli(["export", *export]) == 2


@pytest.mark.parametrize(
    ("keys", "shown"),
    [
        (["attention.kinds.memory={mixer:gated}"], "attention.kinds must be null"),
        (["attention.kinds.memory={mixer:ssd,head:2}"], "its names: linear, lightning, ssd"),
        (["attention.kinds.memory={heads:2}"], "attention.kinds must be null"),
        (["parallel.layout=striped"], "a state would travel with every token"),
        (["model.rope_kinds={memory:{theta:2.0}}"], "no layer is of kind memory"),
    ],
)
def test_what_does_not_fit_is_one_line(keys, shown):
    with pytest.raises(SettingsError) as error:
        load_keys("model=hybrid-tiny", *keys)
    assert shown in str(error.value) and "\n" not in str(error.value)


def test_a_state_begins_with_each_text():
    documents, seq_len = [5, 3, 8], 8
    for name, lengths in (("documents", [5, 3, 8]), ("causal", [8, 8])):
        run = load_keys("model=hybrid-tiny", f"attention={name}")
        assert run.attention.states(documents, seq_len) == {"memory": lengths}
        assert list(run.attention.masks(documents, seq_len)) == ["global"]


def test_first_weights_are_those_of_their_sources():
    model = Decoder(sizes_of("kda", key_dim=64), 0).layers[0].mixer
    assert ((model.A_log.exp() >= 1) & (model.A_log.exp() <= 16)).all()
    step = torch.nn.functional.softplus(model.dt_bias)
    assert step.min() >= 0.00099 and step.max() <= 0.101 and step.max() > 20 * step.min()
    assert (model.out_norm.weight == 1).all() and 0.3 < model.conv_weight.abs().max() <= 0.5
    assert (Decoder(sizes_of("ssd"), 0).layers[0].mixer.D == 1).all()


def test_pretrained_weights_have_no_mixers():
    run = load_keys("model=hybrid-tiny")
    with pytest.raises(ValueError, match="has no weights for a mixer"):
        config.with_keys(run, model={"path": "somewhere"})


class _Alone:
    """The mesh of one virtual rank."""

    def __init__(self, rank, together):
        self.device, self.cp, self.cp_rank = torch.device("cpu"), rank.world, rank.rank
        self.rank, self.together = rank, together

    def attend(self, plans):
        own = {
            kind: lambda q, k, v, plan=plan: ring_attention(q, k, v, plan, group=self.rank)
            for kind, plan in plans.items()
        }
        along = {k: {"segments": s, "group": self.rank} for k, s in plans.segments.items()}
        return own | along

    def total(self, value):
        return [self.together(value)]


@pytest.mark.parametrize("ignores", [None, "state", "documents"])
def test_the_self_check_finds_a_state_that_stays_on_its_rank(monkeypatch, ignores):
    sizes = sizes_of("gated_delta", conv=1)
    model = Decoder(sizes, 0)
    real = mixers.delta

    def wrong(*args, segments, group):
        n = segments.layout.count(group.rank)
        lengths = [n] if ignores == "documents" else [1] * n
        whole = ra.make_segments(ra.masks.documents(lengths), ra.layouts.contiguous(n, 1))
        return real(*args, segments=whole, group=VirtualWorld(1).run(lambda rank: rank)[0])

    if ignores:
        monkeypatch.setattr(mixers, "delta", wrong)

    def run(rank):
        context = _Alone(rank, lambda value: value)
        try:
            check_engaged(context, Strategy(rank.world, "zigzag"),
                          lambda t, p, attend: model(t, p, attend), 40, ["global"],
                          ["memory"])  # fmt: skip
        except RuntimeError as error:
            return str(error)

    said = VirtualWorld(2, 60).run(run)
    assert all((text is None) == (ignores is None) for text in said), said


def test_a_forecast_of_a_hybrid_knows_its_states():
    keys = ["model=hybrid-1b", "hardware=h100", "precision=bf16", "seq_len=65536",
            "parallel.cp=8", "parallel.node_size=8"]  # fmt: skip
    hybrid, plain = (
        on_paper(load_keys(*keys, *more), 8)
        for more in ([], ["attention.kinds=null", "attention.pattern=null"])
    )
    mixer = hybrid.run.sizes.mixer_of("memory")
    matrices = 6 * hybrid.run.sizes.matmul_parameters * hybrid.tokens
    states = 3 * 12 * mixer.flops * hybrid.tokens
    pairs = 12 * hybrid.plans.pairs * 32 * 64
    assert hybrid.flops == pytest.approx(matrices + states + pairs)
    parts = hybrid.step.parts, plain.step.parts
    assert parts[0]["attention kernel"] == pytest.approx(parts[1]["attention kernel"] / 4)
    assert hybrid.step.received["states"] > 0 and "states" in hybrid.memory.moments
    again = on_paper(load_keys(*keys, "memory.checkpoint=true"), 8)
    assert again.memory.kept < hybrid.memory.kept / 4
    long = on_paper(load_keys(*keys, "seq_len=131072"), 8)
    assert long.step.received["states"] == hybrid.step.received["states"]


def test_a_forecast_counts_summaries_as_time_and_memory(tmp_path):
    """A delta rule's on many ranks weigh more than the tokens; a convolution has a halo alone."""
    keys = ["model=hybrid-1b", "hardware=h100", "precision=bf16", "seq_len=65536",
            "parallel.node_size=8"]  # fmt: skip
    few, many = (on_paper(load_keys(*keys, f"parallel.cp={cp}"), cp) for cp in (8, 64))
    states = [ahead.step.received["states"] for ahead in (few, many)]
    assert 2 * states[0] > states[1] > 1.5 * states[0]  # by the logarithm of the ranks
    assert (few.way("memory"), many.way("memory")) == ("doubling",) * 2
    summaries = many.received_states("memory").forward
    without = footprint(many.run.sizes, many.setup, many.local_tokens).moments["states"]
    assert many.memory.moments["states"] - without >= summaries > 2**24
    conv = ["attention.kinds={memory:{mixer:conv},global:causal}"]
    short, slow = (
        on_paper(load_keys(*keys, *more, "parallel.cp=64"), 64).step.parts["exposed exchange"]
        for more in (conv, [])
    )
    assert slow > 1.2 * short > 0
    alone = [*keys[:4], *conv, "parallel.cp=1", "parallel.node_size=1"]
    one = on_paper(load_keys(*alone), 1).step.parts["exposed exchange"]
    assert one == 0

    pure = ["attention.kinds={memory:{mixer:ssd}}", "attention.pattern=[memory]", "ranks=64"]
    trace = tmp_path / "trace.json"
    assert cli(["estimate", "data.root=null", *keys[:4], *pure, "--trace", str(trace)]) == 0
    assert json.loads(trace.read_text())["traceEvents"]
    assert cli(["estimate", "data.root=null", *keys[:4], *pure, "--search"]) == 0


def test_the_plan_of_a_hybrid_as_a_table_json_and_a_picture(tmp_path, capsys):
    kinds = ["kinds=memory: gated_delta; global: documents([100,156])", "world=4", "heads=2"]
    keys = ["plan", *kinds, "pattern=memory,memory,memory,global", "head_dim=16"]
    assert cli([*keys, "--check", "--plot", str(tmp_path / "plan.png")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "3 layers of kind memory: gated_delta; 7 segments of zigzag, 2 documents" in shown
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    assert cli([*keys, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["kinds"]["memory"]
    segments = ra.make_segments(ra.masks.documents([100, 156]), ra.layouts.zigzag(256, 4))
    mixer = Mixer(mixer="gated_delta", heads=2, key_dim=16, value_dim=16)
    for rank in facts["ranks"]:
        want = ra.cost.received_states(segments, rank["rank"], mixer, 2)
        assert rank["forward_bytes"] == want.forward
    assert cli(["plan", "kinds=memory: ssd", "n=64", "world=2"]) == 0
    blocks = "kinds=memory: ssd; near: block_local(64); far: causal"  # blocks are no documents
    assert cli(["plan", blocks, "n=256", "world=2", "--json"]) == 0
    shown = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(shown)["kinds"]["memory"]["documents"] == 1
    assert cli([*keys, "layout=striped"]) == 2
    assert "a state would travel with every token" in capsys.readouterr().err
