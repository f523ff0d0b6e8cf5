"""The cost model: what it counts against what is there, and what must hold on any machine."""

import json
from dataclasses import replace
from importlib.resources import files
from itertools import pairwise

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import ringattn as ra
from ringattn import cost
from ringattn.cost.hardware import Curve, HardwareError, KernelSpeed, Link
from ringattn.cost.model import Setup, footprint, product_flops, step_flops
from ringattn.cost.presets import load, names
from ringattn.cost.step import predict
from ringattn.cost.timeline import _sizes, kernel_seconds
from ringattn.models.decoder import Decoder, ModelConfig
from ringattn.models.memory import Memory
from ringattn.planning.runs import Run
from ringattn.planning.slices import Band, Bands
from ringattn.training import config
from ringattn.training.engines import FSDP, DeepSpeed
from ringattn.training.search import search

from .cases import plans

SMALL = ModelConfig(
    dim=64, layers=3, heads=4, kv_heads=2, head_dim=16, ffn_dim=96, vocab_size=101, tied=False
)
EIGHT = ModelConfig(dim=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn_dim=14336,
                    vocab_size=128256, tied=False)  # fmt: skip
# Compute and exchanges of the same order, so that both can be the longer one.
SLOW = replace(
    load("h100"),
    forward=KernelSpeed(),
    backward=KernelSpeed(),
    matmul=Curve.of(0.7),
    peak=(("bf16", 1e6), ("fp32", 1e6)),
    intra_node=Link(Curve.of(2e3), 1e-3, 1e-4),
    inter_node=Link(Curve.of(5e2), 2e-3, 1e-4),
    memory_bandwidth=1e12,
)
SHAPE = cost.AttentionShape(4, 2, 8, itemsize=4)


def test_curves_are_linear_between_their_points_and_flat_beyond():
    curve = Curve.of({1024: 0.2, 4096: 0.6})
    assert curve(2048) == pytest.approx(0.4)
    assert curve(1) == 0.2 and curve(10**9) == 0.6 and Curve.of(0.5)(77) == 0.5


@given(st.integers(1, 40), st.integers(1, 40), st.integers(-45, 45), st.integers(0, 60))
def test_rows_that_a_diagonal_cuts_are_counted(n_q, n_k, lo, width):
    pairs = np.arange(n_k)[None] - np.arange(n_q)[:, None]
    seen = (pairs >= lo) & (pairs <= lo + width)
    rows = seen.any(1)
    if not seen.any():
        return
    band = Band.make(Run(0, n_q), Run(0, n_k), lo, lo + width)
    area, left, right, _ = _sizes(Bands([band]))
    assert area[0] == seen.sum()
    # A row is cut on a side where the block goes on and the band does not.
    assert left[0] == (rows & ~seen[:, 0]).sum()
    assert right[0] == (rows & ~seen[:, -1]).sum()


def test_a_kernel_call_is_its_pairs_and_what_diagonals_cost():
    kernel = KernelSpeed(Curve.of(0.5), Curve.of(10.0), Curve.of(3.0), softmax=16.0)
    n, flops, peak, dims = 64, 100.0, 1e6, 32
    unit = flops * 1.5 / (peak * 0.5)  # softmax is half of the products
    full = Bands([Band.make(Run(0, n), Run(0, n), -n, n)])
    causal = Bands([Band.make(Run(0, n), Run(0, n), -n, 0)])
    window = Bands([Band.make(Run(0, n), Run(0, n), -7, 0)])
    seconds = [kernel_seconds(b, flops, peak, kernel, dims) for b in (full, causal, window)]
    assert seconds[0] == pytest.approx(n * n * unit)
    assert seconds[1] == pytest.approx((n * (n + 1) / 2 + 10 * (n - 1)) * unit)
    area, cut = window[0].area, (n - 1) + (n - 8)
    assert seconds[2] == pytest.approx((area + 3 * cut) * unit)


@given(plans(max_n=40, max_world=8, ulysses=False))
def test_no_step_ends_before_its_work_or_its_bytes(plan):
    line = cost.simulate(plan, SHAPE, SLOW, "fp32", plan.world)
    pair = SHAPE.pair_flops() / (1e6 * 0.45)
    areas = max(plan.area(rank) for rank in range(plan.world))
    assert line.compute >= areas * pair * 3.5 * (1 - 1e-9)
    assert line.seconds >= line.compute * (1 - 1e-9)
    for rank in range(plan.world):
        bytes_ = cost.received(plan, rank, SHAPE)
        assert line.forward >= bytes_.forward / 2e3 * (1 - 1e-9)
        assert line.backward >= bytes_.backward / 2e3 * (1 - 1e-9)


@given(plans(max_n=40, max_world=8, ulysses=False), st.floats(1.1, 30))
def test_a_faster_link_or_kernel_never_costs(plan, factor):
    before = cost.simulate(plan, SHAPE, SLOW, "fp32", plan.node_size)
    links = {
        name: Link(Curve.of(getattr(SLOW, name).bandwidth(1) * factor)) for name in
        ("intra_node", "inter_node")
    }  # fmt: skip
    after = cost.simulate(plan, SHAPE, replace(SLOW, **links), "fp32", plan.node_size)
    assert after.seconds <= before.seconds * (1 + 1e-9)
    faster = replace(SLOW, peak=(("fp32", 1e6 * factor),))
    assert cost.simulate(plan, SHAPE, faster, "fp32", plan.node_size).seconds <= before.seconds


def test_exchanges_hide_behind_kernels_or_do_not():
    mask = ra.masks.causal(4096)
    plan = ra.make_plan(mask, ra.layouts.zigzag(4096, 8), "ring")
    quick = replace(SLOW, intra_node=Link(Curve.of(1e15)), inter_node=Link(Curve.of(1e15)))
    assert cost.simulate(plan, SHAPE, quick, "fp32").exposed < 1e-6
    # With nothing hidden, what a rank exchanges is added to what it computes.
    bare = replace(SLOW, intra_node=Link(Curve.of(1e4)), overlap_efficiency=0.0)
    line = cost.simulate(plan, SHAPE, bare, "fp32")
    bytes_ = cost.received(plan, 3, SHAPE)
    assert line.exposed == pytest.approx((bytes_.forward + bytes_.backward) / 1e4, rel=0.15)


def test_ranks_that_share_cores_take_as_long_as_all_their_work():
    mask = ra.masks.causal(4096)
    plan = ra.make_plan(mask, ra.layouts.zigzag(4096, 8), "ring")
    free = replace(SLOW, intra_node=Link(Curve.of(1e15)), inter_node=Link(Curve.of(1e15)))
    alone = cost.simulate(plan, SHAPE, free, "fp32").seconds
    assert cost.simulate(plan, SHAPE, replace(free, cores=2), "fp32").seconds == pytest.approx(
        4 * alone, rel=1e-3
    )
    lazy = ra.make_plan(mask, ra.layouts.contiguous(4096, 8), "all_gather")
    total = SHAPE.pair_flops() * mask.area * 3.5 / (1e6 * 0.45)
    assert cost.simulate(lazy, SHAPE, replace(free, cores=2), "fp32").seconds >= total / 2


def test_ranks_of_a_node_share_its_link():
    """An exchange of all of them takes no less than all their bytes; of one, its own alone."""
    mask = ra.masks.full(256)
    free = replace(SLOW, inter_node=Link(Curve.of(5e2)), intra_node=Link(Curve.of(1e15)))
    shared = replace(free, inter_node=Link(Curve.of(5e2), node=6e2))

    def seconds(hardware, schedule, world=4, node=2, **more):
        layout = ra.layouts.contiguous(256, world)
        plan = ra.make_plan(mask, layout, schedule, node_size=node, **more)
        return cost.simulate(plan, SHAPE, hardware, "fp32", node)

    assert seconds(shared, "ring").seconds == seconds(free, "ring").seconds  # one rank crosses
    crossing = 2 * (2 * 64) * (2 * 8) * 2 * 4  # ranks, rows of two others, of k and v, heads, bytes
    alone, together = seconds(free, "all_gather"), seconds(shared, "all_gather")
    assert alone.forward < crossing / 6e2 <= together.forward
    # Heads across nodes: all ranks at once.
    heads = [seconds(h, "ring", ulysses=4).seconds for h in (free, shared)]
    assert heads[1] > 1.5 * heads[0]
    # A world that fills no whole number of nodes.
    assert seconds(shared, "all_gather", 6, 2).seconds > 0
    uneven = ra.make_plan(mask, ra.layouts.contiguous(256, 6), "all_gather")
    assert cost.simulate(uneven, SHAPE, shared, "fp32", 4).seconds > 0


def test_cores_are_a_nodes():
    mask = ra.masks.causal(4096)
    plan = ra.make_plan(mask, ra.layouts.zigzag(4096, 8), "ring")
    free = replace(SLOW, intra_node=Link(Curve.of(1e15)), inter_node=Link(Curve.of(1e15)))
    alone = cost.simulate(plan, SHAPE, free, "fp32").seconds
    four = replace(free, cores=2, node_size=2)
    assert cost.simulate(plan, SHAPE, four, "fp32").seconds == pytest.approx(alone, rel=1e-3)
    # Where no other node is known of, all share the cores of this one, whatever its size.
    one = replace(four, inter_node=None)
    for node_size in (None, 2):
        took = cost.simulate(plan, SHAPE, one, "fp32", node_size).seconds
        assert took == pytest.approx(4 * alone, rel=1e-3)
    assert one.node(8) == one.sharing(8) == 8 and four.sharing(8) == 2


def test_a_description_of_one_machine_says_nothing_of_several():
    one = replace(SLOW, inter_node=None)
    assert one.node_size == 8 and one.node(8) == 8 and one.covers(8) and not one.covers(16)
    with pytest.raises(HardwareError, match=r"inter_node: .* one machine of 8 ranks; calibrate"):
        one.node(16)
    plan = ra.make_plan(ra.masks.causal(64), ra.layouts.zigzag(64, 8), "double_ring", node_size=4)
    assert cost.simulate(plan, SHAPE, one, "fp32", 4).seconds > 0  # one link throughout


@given(plans(max_n=40, max_world=8))
def test_spans_tell_the_same_story(plan):
    line = cost.simulate(plan, SHAPE, SLOW, "fp32", plan.node_size, spans=True)
    ends = {"forward": line.forward, "backward": line.backward}
    for span in line.spans:
        assert 0 <= span.begin < span.end <= ends[span.of] * (1 + 1e-9)
    for rank in range(plan.world):
        busy = sorted(
            (s.of, s.begin, s.end) for s in line.spans if s.rank == rank and s.kind == "compute"
        )
        for (of, _, end), (other, begin, _) in pairwise(busy):
            assert of != other or begin >= end - 1e-12


@pytest.mark.parametrize("memory", [{}, {"checkpoint": True}, {"ffn_tile": 8},
                                    {"checkpoint": True, "ffn_tile": 8}])  # fmt: skip
def test_matrix_products_are_those_that_torch_counts(memory):
    model, tokens = Decoder(SMALL, 0, Memory(**memory)), 40
    plan = ra.make_plan(ra.masks.causal(tokens), ra.layouts.contiguous(tokens, 1))
    x = torch.arange(tokens)[None] % SMALL.vocab_size
    with FlopCounterMode(display=False) as counter:
        loss, *_ = model(
            x, torch.arange(tokens), lambda q, k, v: ra.ring_attention(q, k, v, plan), x
        )
        loss.backward()
    counted = sum(
        flops for operator, flops in counter.get_flop_counts()["Global"].items()
        if "mm" in str(operator)
    )  # fmt: skip
    counted += 2 * tokens * SMALL.dim * SMALL.vocab_size  # addmm_, which torch does not count
    expected = sum(product_flops(SMALL, Setup(DeepSpeed(), Memory(**memory)), tokens).values())
    assert counted == pytest.approx(expected, rel=1e-6)


def test_engines_move_what_their_algorithms_need():
    n, world = SMALL.parameters, 8
    share = (world - 1) / world
    for engine, bytes_ in (
        (DeepSpeed(zero_stage=0), 8 * n * share),  # a scatter and a gather of float32
        (DeepSpeed(zero_stage=1), (4 + 2) * n * share),  # float32 gradients, bf16 weights
        (DeepSpeed(zero_stage=2), (4 + 2) * n * share),
        (DeepSpeed(zero_stage=3), (4 + 2 * 2) * n * share),  # gathered forward and backward
        (FSDP(zero_stage=3), (4 + 2 * 2) * n * share),
        (FSDP(zero_stage=2), (4 + 2) * n * share),
    ):
        moved = engine.traffic(SMALL, 2, world, 1)
        assert moved.gathered + moved.reduced + moved.at_step == pytest.approx(bytes_)
        alone = engine.traffic(SMALL, 2, 1, 1)
        assert alone.gathered + alone.reduced + alone.at_step == 0


def test_a_step_is_its_parts_and_mfu_follows():
    plan = ra.make_plan(ra.masks.causal(2**17), ra.layouts.zigzag(2**17, 8), "ring")
    setup = Setup(DeepSpeed(zero_stage=3), Memory(checkpoint=True), world=16, cp=8, grad_accum=3)
    found = predict(EIGHT, setup, plan, load("h100"))
    assert found.tokens == 2**17 * 3 * 2
    assert found.seconds == pytest.approx(sum(found.parts.values()))
    flops = step_flops(EIGHT, found.tokens, plan.mask.area * 6)
    assert found.flops == flops
    assert found.mfu == pytest.approx(flops / found.seconds / 16 / 989e12)
    executed = found.executed
    # What is executed is what MFU counts, attention's recomputed scores and the rest recomputed.
    again = executed["recomputed"] + executed["attention"] / 7
    assert 16 * (sum(executed.values()) - again) == pytest.approx(flops, rel=1e-6)
    bytes_ = cost.received(plan, 7, cost.AttentionShape(32, 8, 128))
    assert found.received["attention backward"] == bytes_.backward * 32 * 3
    parts = found.memory.state_parts
    assert found.memory.states == pytest.approx(sum(parts.values()), abs=3)
    assert parts["optimizer"] == pytest.approx(6 * parts["weights"])  # 12 and 2 bytes a parameter
    once = predict(EIGHT, replace(setup, grad_accum=1), plan, load("h100"))
    assert found.parts["attention kernel"] == pytest.approx(3 * once.parts["attention kernel"])
    assert found.seconds < 3 * once.seconds  # the optimizer steps once


def test_memory_grows_with_tokens_and_shrinks_with_what_is_given_up():
    def need(stage=1, **memory):
        setup = Setup(DeepSpeed(zero_stage=stage), Memory(**memory), world=8, cp=8)
        return footprint(EIGHT, setup, 2**17)

    plain, again = need().device, need(checkpoint=True).device
    tiled = need(checkpoint=True, ffn_tile=4096).device
    away = need(checkpoint=True, ffn_tile=4096, offload=True).device
    assert plain > again > tiled > away
    host = need(checkpoint=True, offload=True)
    assert host.offloaded == 2**17 * 32 * (2 * 4096 * 2 + 4 * 32)
    assert need(3).device < need(2).device < need(1).device < need(0).device


def test_every_preset_is_whole():
    assert {"h100", "h200", "b200", "mi300x"} <= set(names())
    for name in names():
        hardware = load(name)
        assert hardware.flops("bf16") > 1e14 and hardware.memory > 5e10
        assert 0.05 < float(hardware.forward.efficiency(8192)) < 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speed": 3}, "unknown key 'speed'"),
        ({"hidden": 1}, "unknown key 'hidden'; it is overlap_efficiency now"),
        ({"peak": None}, "peak must be a mapping"),
        ({"memory": "much"}, "memory must be a number"),
        ({"overlap_efficiency": -1}, "overlap_efficiency must be a number of at least 0"),
        ({"intra_node": {"bandwidth": {}, "latency": 0}}, "intra_node.bandwidth must be"),
        ({"intra_node": {"bandwidth": 1, "width": 0}}, "intra_node has bandwidth, latency"),
        ({"forward": {"edge": 3}}, "forward has efficiency"),
    ],
)
def test_a_wrong_description_is_one_line(change, message, tmp_path):
    whole = yaml.safe_load((files("ringattn.configs") / "machines" / "h100.yaml").read_text())
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(whole | change))
    with pytest.raises(HardwareError, match=message) as error:
        load(str(file))
    assert "\n" not in str(error.value) and str(file) in str(error.value)


def test_missing_and_unknown_descriptions(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, message in (
        ("this", "run ringattn calibrate"),
        ("h1000", "one of: b200, h100, h200, mi300x, this"),
        (str(tmp_path / "none.yaml"), "No such file"),
    ):
        with pytest.raises(HardwareError, match=message):
            load(name)
    (tmp_path / "bad.yaml").write_text("[1, 2")
    with pytest.raises(HardwareError, match="no YAML"):
        load(str(tmp_path / "bad.yaml"))


def found(ranks=16, seq_len=2**18, keys=(), seconds=60, **more):
    keys = ["model=8b", "model.vocab_size=128256", "precision=bf16", "attention=causal",
            "data.root=null", f"seq_len={seq_len}", *keys]  # fmt: skip
    given = frozenset(key.split("=")[0] for key in keys) | {"engine.name"} & {
        f"{key.split('=')[0]}.name" for key in keys
    }
    return search(config.load(keys), ranks, load("h100"), given, seconds=seconds, **more)


def test_the_search_finds_what_trying_everything_finds():
    answer = found(8, 2**17)
    assert not answer.untried
    speeds = [split.step.tokens_per_s for split in answer.ranked]
    assert speeds == sorted(speeds, reverse=True)
    best = answer.ranked[0].step
    assert all(split.step.misfit is None for split in answer.ranked)
    # Any one of these, by itself, is no faster.
    mask = ra.masks.causal(2**17)
    tiled = Memory(checkpoint=True, ffn_tile=8192, loss_chunk=2048)
    away = Memory(checkpoint=True, offload=True, loss_chunk=2048)
    for cp in (1, 2, 4):
        for schedule in ("ring", "all_gather", "direct"):
            plan = ra.make_plan(mask, ra.layouts.zigzag(2**17, cp), schedule)
            for engine, memory in (
                (DeepSpeed(zero_stage=3), Memory(loss_chunk=2048)),
                (DeepSpeed(zero_stage=3), Memory(checkpoint=True, loss_chunk=2048)),
                (DeepSpeed(zero_stage=2), tiled),
                (FSDP(), away),
            ):
                setup = Setup(engine, memory, world=8, cp=cp)
                other = predict(EIGHT, setup, plan, load("h100"))
                if other.misfit is None:
                    assert other.tokens_per_s <= best.tokens_per_s * 1.001


def test_what_is_not_followed_is_no_faster_and_what_is_left_out_is_said():
    every, none = found(8, 2**17), found(8, 2**17, seconds=0)
    assert every.slower and not every.untried
    assert not none.ranked and sum(none.untried.values()) == len(every.ranked) + every.slower
    kinds = {(s.step.setup.layout, s.step.setup.schedule) for s in every.ranked}
    assert {"zigzag", "striped", "balanced"} <= {layout for layout, _ in kinds}


def test_what_does_not_fit_says_why_and_the_longest_is_the_longest():
    answer = found(seq_len=2**22, seconds=0.2)
    assert answer.stopped and all(reason for reason in answer.stopped.values())
    fits = found(seq_len=answer.longest, keys=["parallel.layout=zigzag"])
    assert fits.ranked
    beyond = found(seq_len=int(1.05 * answer.longest), seconds=0.2)
    assert not beyond.ranked and set(beyond.stopped) == {1, 2, 4, 8, 16}
    assert "GiB" in beyond.stopped[16]


def test_what_the_user_fixes_stays():
    keys = ["parallel.cp=8", "parallel.schedule=direct", "engine=fsdp"]
    answer = found(keys=keys)
    assert answer.ranked
    for p in (split.step for split in answer.ranked):
        assert (p.setup.cp, p.setup.schedule, p.setup.engine.name) == (8, "direct", "fsdp")
    with pytest.raises(ValueError, match="cp=3 does not divide"):
        found(keys=["parallel.cp=3"])
    with pytest.raises(ValueError, match="sequences=3"):
        found(keys=["parallel.cp=8"], sequences=3)
    four = found(sequences=4, seconds=0.2)
    steps = [split.step for split in four.ranked]
    assert {p.setup.grad_accum * p.setup.world // p.setup.cp for p in steps} == {4}


def test_calibration_describes_the_machine_in_the_models_terms(monkeypatch, tmp_path):
    """One rank, few sizes: what it writes is read again, and predicts what it has measured."""
    import torch.distributed as dist

    from ringattn import measure, measure_links
    from ringattn.cost.presets import write

    monkeypatch.setattr(measure_links, "SECONDS", 0.02)
    monkeypatch.setattr(measure, "_BLOCKS", (64, 128, 256, 512))
    monkeypatch.setattr(measure, "_SIDES", (64, 256))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    try:
        bench = measure._Bench(torch.device("cpu"), (4, 2, 16), ["fp32", "bf16"])
        found = bench.run()
    finally:
        dist.destroy_process_group()
    write(found | {"name": "x", "source": "y"}, tmp_path / "mine.yaml")
    hardware = load(str(tmp_path / "mine.yaml"))
    assert hardware.flops("fp32") > 1e9 and hardware.memory > 1e9
    # The curves are the measurements, so a block of a size that was measured is predicted.
    for n, efficiency in found["forward"]["efficiency"].items():
        full = Bands([Band.make(Run(0, n), Run(0, n), -n, n)])
        took = kernel_seconds(full, 4 * 4 * 16, hardware.flops("fp32"), hardware.forward, 32)
        flops = 2 * 4 * (32 + found["forward"]["softmax"]) * n * n
        assert took == pytest.approx(flops / efficiency / found["peak"]["fp32"], rel=1e-2)
