"""Mixers with a state, over split sequences, beside the recurrence in float64."""

import dataclasses
import re
import threading
import types
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import ringattn as ra
from ringattn.execution.carriers import Counted, VirtualWorld
from ringattn.mixers import chunks, conv, delta, features, linear, naive, recurrent, scan, states
from ringattn.planning.layouts import Layout
from ringattn.planning.prefixes import Prefixes
from ringattn.planning.runs import Run
from ringattn.planning.segments import WAYS, Segments
from ringattn.planning.state_exchange import Relayout, StateBytes, exchange_of

from .processes import ROOT, launch

HEADS, DK, DV, CHANNELS, WIDTH, STATE = 2, 4, 3, 5, 4, 3


@dataclasses.dataclass(frozen=True)
class Mixer:
    """``make(draw, n)``: named inputs, those that have an axis of tokens by their names in
    ``local``; ``split(inputs, segments, group)`` and ``whole(inputs, lengths)``."""

    make: object
    split: object
    whole: object
    shared: tuple = ()


def _qkv(draw, n, decay):
    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    found = {
        "q": normal(2, n, HEADS, DK),
        "k": torch.nn.functional.normalize(normal(2, n, HEADS, DK), dim=-1),
        "v": normal(2, n, HEADS, DV),
        "beta": torch.rand(2, n, HEADS, generator=draw, dtype=torch.float64),
        "initial": normal(HEADS, DK, DV),
    }
    shape = {"none": None, "heads": (HEADS,), "scalar": (2, n, HEADS), "vector": (2, n, HEADS, DK)}
    if shape[decay]:
        found["decay"] = -torch.rand(*shape[decay], generator=draw, dtype=torch.float64)
    return found


def _recurrent(mixer, decay, chunk):
    uses_beta = mixer is delta

    def make(draw, n):
        found = _qkv(draw, n, decay)
        return found if uses_beta else {k: x for k, x in found.items() if k != "beta"}

    def split(x, segments, group):
        given = (x["q"], x["k"], x["v"], *([x["beta"]] if uses_beta else []), x.get("decay"))
        return mixer(
            *given, segments=segments, group=group, initial=x["initial"], scale=0.7, chunk=chunk
        )

    def whole(x, lengths):
        log = x.get("decay")
        if log is not None and log.dim() == 1:
            log = log.expand(x["k"].shape[:3])
        args = (0.7 * x["q"], x["k"], x["v"], log, x.get("beta"), x["initial"], lengths)
        return naive.recurrence(*args)

    return Mixer(make, split, whole, ("initial", *(["decay"] if decay == "heads" else [])))


def _conv():
    def make(draw, n):
        return {
            "x": torch.randn(2, n, CHANNELS, generator=draw, dtype=torch.float64),
            "weight": torch.randn(CHANNELS, WIDTH, generator=draw, dtype=torch.float64),
            "bias": torch.randn(CHANNELS, generator=draw, dtype=torch.float64),
        }

    return Mixer(
        make,
        lambda x, segments, group: conv(
            x["x"], x["weight"], x["bias"], segments=segments, group=group
        ),
        lambda x, lengths: naive.convolution(x["x"], x["weight"], lengths) + x["bias"],
        ("weight", "bias"),
    )


def _scan():
    def make(draw, n):
        def normal(*shape):
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        return {
            "x": normal(2, n, CHANNELS),
            "dt": torch.rand(2, n, CHANNELS, generator=draw, dtype=torch.float64),
            "A": -torch.rand(CHANNELS, STATE, generator=draw, dtype=torch.float64),
            "B": normal(2, n, STATE),
            "C": normal(2, n, STATE),
        }

    def whole(x, lengths):
        """A head for each channel, with one value."""
        shape = (*x["x"].shape, STATE)
        q, k = (x[name][:, :, None].expand(shape) for name in ("C", "B"))
        log = x["dt"][..., None] * x["A"]
        v = (x["dt"] * x["x"])[..., None]
        return naive.recurrence(q, k, v, log, lengths=lengths)[..., 0]

    def split(x, segments, group):
        given = [x[name] for name in ("x", "dt", "A", "B", "C")]
        return scan(*given, segments=segments, group=group, chunk=5)

    return Mixer(make, split, whole, ("A",))


MIXERS = {
    "linear": _recurrent(linear, "none", 4),
    "retention": _recurrent(linear, "heads", 4),
    "ssd": _recurrent(linear, "scalar", 5),
    "gla": _recurrent(linear, "vector", 3),
    "delta": _recurrent(delta, "none", 4),
    "gated delta": _recurrent(delta, "scalar", 5),
    "kimi delta": _recurrent(delta, "vector", 3),
    "conv": _conv(),
    "scan": _scan(),
}


def both(
    mixer,
    layout,
    lengths,
    seed=0,
    change=lambda inputs: None,
    wrap=lambda f: f,
    carrier=lambda r: r,
    way=None,
):
    """Relative errors of the output and of every gradient, by name; and the outputs by rank."""
    draw = torch.Generator().manual_seed(seed)
    n, segments = layout.n, Segments(layout, lengths, way)
    inputs = mixer.make(draw, n)
    change(inputs)
    reference = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    want = mixer.whole(reference, lengths)
    d_out = torch.randn(want.shape, generator=draw, dtype=torch.float64)
    want.backward(d_out)

    def work(rank):
        own = {
            name: (x if name in mixer.shared else layout.shard(x, rank.rank)).float().clone()
            for name, x in inputs.items()
        }
        for x in own.values():
            x.requires_grad_()
        group = carrier(rank)
        out = wrap(lambda: mixer.split(own, segments, group))()
        out.backward(layout.shard(d_out, rank.rank).float())
        return out.detach(), {name: x.grad for name, x in own.items()}

    found = VirtualWorld(layout.world, 60).run(work)
    errors = {"out": _apart(layout.unshard([out for out, _ in found]), want.detach())}
    for name, x in reference.items():
        parts = [grads[name] for _, grads in found]
        whole = sum(parts) if name in mixer.shared else layout.unshard(parts)
        errors[f"d_{name}"] = _apart(whole, x.grad)
    return errors, [out for out, _ in found]


def _apart(got, want):
    return float((got.double() - want).norm() / (want.norm() + 1))


@st.composite
def layouts_of_segments(draw):
    """Any contiguous runs, in any order, over ranks of which some may own nothing."""
    world = draw(st.sampled_from([1, 2, 3, 5, 8]))
    n = draw(st.integers(1, 45))
    cuts = draw(st.lists(st.integers(0, n), max_size=9))
    edges = sorted({0, n, *cuts})
    runs = [[] for _ in range(world)]
    for a, b in pairwise(edges):
        runs[draw(st.integers(0, world - 1))].append(Run(a, b))
    lengths, left = [], n
    while left:
        lengths.append(draw(st.integers(1, left)))
        left -= lengths[-1]
    return Layout(n, tuple(map(tuple, runs))), lengths


@pytest.mark.parametrize("name", MIXERS)
@settings(max_examples=25)
@given(
    case=layouts_of_segments(),
    seed=st.integers(0, 2**31),
    way=st.sampled_from([None, *WAYS]),
)
def test_any_segments_and_documents_are_the_recurrence(name, case, seed, way):
    layout, _ = case
    if way and way.startswith("contiguous") and layout.n < layout.world:
        with pytest.raises(ValueError, match="tokens for"):
            Segments(*case, way)
        return
    errors, _ = both(MIXERS[name], *case, seed, way=way)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize(
    ("kind", "way"),
    [("contiguous", "direct"), ("zigzag", "direct"), ("zigzag", "doubling"), ("balanced", None)],
)
def test_errors_do_not_grow_with_ranks(name, kind, way):
    lengths = [70, 3, 1, 260, 41]
    n, mask = sum(lengths), ra.masks.documents(lengths)
    worst = {}
    for world in (1, 4, 64):
        make = getattr(ra.layouts, kind)
        layout = make(mask, world) if kind == "balanced" else make(n, world)
        errors, _ = both(MIXERS[name], layout, lengths, way=way)
        worst[world] = max(errors.values())
    assert worst[4] < 1e-5 and worst[64] < 2 * worst[1] + 2e-7, worst


@pytest.mark.parametrize("name", [n for n, m in MIXERS.items() if n not in ("linear", "delta")])
def test_extreme_decays_are_finite_and_right(name):
    """1 - 1e-7 and 1e-30, side by side."""
    least = torch.tensor([-1e-7, -69.0], dtype=torch.float64)

    def change(inputs):
        if "decay" in inputs:
            pick = (torch.arange(inputs["decay"].numel()) * 7 % 3 == 0).long()
            inputs["decay"] = least[pick].view(inputs["decay"].shape)
        elif "A" in inputs:
            inputs["A"] = least[torch.arange(CHANNELS * STATE) % 2].view(CHANNELS, STATE)

    errors, outs = both(MIXERS[name], ra.layouts.zigzag(60, 3), [37, 23], change=change)
    assert max(errors.values()) < 2e-5, errors
    assert all(out.isfinite().all() for out in outs)


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("way", ["direct", "contiguous doubling"])
def test_runs_repeat_bitwise_and_under_checkpointing(name, way):
    layout, lengths = ra.layouts.zigzag(61, 3), [20, 30, 11]
    first, outs = both(MIXERS[name], layout, lengths, way=way)
    again, others = both(
        MIXERS[name], layout, lengths, way=way,
        wrap=lambda f: lambda: checkpoint(f, use_reentrant=False),
    )  # fmt: skip
    assert first == again and all(map(torch.equal, outs, others))


@pytest.mark.parametrize("name", ["linear", "ssd", "gla", "gated delta"])
@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("way", WAYS)
def test_bytes_are_the_plans_and_do_not_grow_with_the_length(name, kind, way):
    given = (
        HEADS * (2 * DK + DV) + HEADS * {"linear": 0, "ssd": 1, "gla": DK, "gated delta": 2}[name]
    )
    through = {"linear": 1, "ssd": 1, "gla": DK, "gated delta": DK * DK}[name]
    sizes = StateBytes(4 * HEADS * DK * DV, 4 * HEADS * through, 4 * given, 4 * HEADS * DV)
    received = []
    for n in (64, 640):
        layout, carriers = getattr(ra.layouts, kind)(n, 5), {}

        def counted(rank, carriers=carriers):
            return carriers.setdefault(rank.rank, Counted(rank))

        both(MIXERS[name], layout, [n], carrier=counted, way=way)
        exchange = exchange_of(Segments(layout, [n], way), sizes.times(2))
        got = [carriers[rank].received for rank in range(5)]
        assert got == [sum(exchange.received(rank, sizes.times(2))) for rank in range(5)]
        received.append(got)
    grows = way.startswith("contiguous") and kind == "zigzag"
    assert (received[0] != received[1]) == grows and sum(received[0]) > 0


class _Logged:
    """Another carrier; when its exchanges begin and end, and what comes between."""

    def __init__(self, carrier):
        self.carrier, self.rank, self.world, self.log = carrier, carrier.rank, carrier.world, []

    def start(self, *exchange):
        self.log.append("begins")
        pending = self.carrier.start(*exchange)
        return types.SimpleNamespace(wait=lambda: (pending.wait(), self.log.append("ends")))


def test_products_within_chunks_are_computed_while_summaries_travel(monkeypatch):
    """In the forward, and their backward while gradients of states travel."""
    loggers, pairs = {}, recurrent._pairs

    def logged(q, k, total):
        found, log = pairs(q, k, total), loggers[threading.get_ident()].log
        log.append("products")
        if found.requires_grad:
            found.register_hook(lambda grad: log.append("their backward"))
        return found

    monkeypatch.setattr(recurrent, "_pairs", logged)

    def known(rank):
        return loggers.setdefault(threading.get_ident(), _Logged(rank))

    both(MIXERS["ssd"], ra.layouts.contiguous(40, 2), [40], carrier=known, way="direct")
    once = ["begins", "products", "ends", "begins", "their backward", "ends"]
    assert [logger.log for logger in loggers.values()] == [once, once]


def test_what_is_received_grows_with_the_logarithm_of_the_ranks():
    """Doubling: a summary for the neighbour and one more for each doubling of distance."""
    summaries = StateBytes(1, 0, 10**6, 10**6)
    most = {}
    for world in (2, 8, 64, 512):
        segments = Segments(ra.layouts.contiguous(2 * world, world), [2 * world], "doubling")
        exchange = exchange_of(segments, summaries)
        most[world] = max(exchange.received(rank, summaries)[0] for rank in range(world))
        assert len(exchange.incoming(0, summaries)[0]) == most[world]
    assert most == {2: 1, 8: 4, 64: 7, 512: 10}


def test_the_way_is_chosen_by_bytes():
    """Small states go at once; large ones in steps; where they outweigh the tokens these move."""

    def way(n, world, state, token):
        segments = Segments(ra.layouts.zigzag(n, world), [n])
        return exchange_of(segments, StateBytes(state, state, token, token)).way

    assert way(2**20, 8, 2**10, 2**12) == "direct"
    assert way(2**20, 64, 2**20, 2**14) == "doubling"
    assert way(2**12, 64, 2**20, 2**10) == "contiguous doubling"
    assert way(2**12, 1, 2**20, 2**10) == "direct"
    alone = Segments(ra.layouts.zigzag(40, 2), [10, 10, 10, 10])  # no document is split
    assert exchange_of(alone, StateBytes(10**9, 10**9, 1, 1)).way == "direct"


def test_no_summary_travels_where_documents_end_with_segments():
    layout = ra.layouts.contiguous(40, 4)
    segments = Segments(layout, [10, 10, 20])
    exchange, sizes = exchange_of(segments, StateBytes(1, 0, 9, 9)), StateBytes(1, 0, 9, 9)
    received = [exchange.received(rank, sizes) for rank in range(4)]
    assert received == [(0, 0), (0, 0), (0, 1), (1, 0)]
    assert segments.halo(3, 2).recvs == {2: 2} and not segments.halo(2, 2).recvs


def _wrong_order(monkeypatch):
    reads = Prefixes.reads
    monkeypatch.setattr(Prefixes, "reads", lambda *of: reads(*of)[::-1])


def _too_far(monkeypatch):
    monkeypatch.setattr(Prefixes, "goes_on", lambda self, step, number: False)
    applied = states.applied
    monkeypatch.setattr(states, "applied", lambda t, s: s if t is None else applied(t, s))


def _state_leaks(monkeypatch):
    from ringattn.planning.segments import Segment

    monkeypatch.setattr(Segment, "carries", property(lambda s: s.run.start > 0))


def _halo_off(monkeypatch):
    halo = Segments.halo

    def moved(self, rank, size):
        found = halo(self, rank, size)
        before = [[*rows[1:], rows[-1]] if rows else rows for rows in found.before]
        return dataclasses.replace(found, before=before)

    monkeypatch.setattr(Segments, "halo", moved)


def _decay_twice(monkeypatch):
    summaries = recurrent._summaries

    def more(transition, addend, log, starts, lines):
        ways, ends = summaries(transition, addend, log, starts, lines)
        return ways * 0.9, ends

    monkeypatch.setattr(recurrent, "_summaries", more)


def _transposed(monkeypatch):
    monkeypatch.setattr(chunks, "applied_back", chunks.applied)


def _moved_back_wrong(monkeypatch):
    moves = Relayout.moves

    def swapped(self, rank):
        sends, recvs = moves(self, rank)
        return sends, {peer: rows[::-1] for peer, rows in recvs.items()}

    monkeypatch.setattr(Relayout, "moves", swapped)


@pytest.mark.parametrize(
    ("fault", "name", "way"),
    [
        (_wrong_order, "ssd", "direct"),
        (_wrong_order, "delta", "direct"),
        (_too_far, "delta", "doubling"),
        (_state_leaks, "ssd", "direct"),
        (_state_leaks, "ssd", "doubling"),
        (_halo_off, "conv", None),
        (_decay_twice, "ssd", "direct"),
        (_decay_twice, "kimi delta", "doubling"),
        (_transposed, "gated delta", None),
        (_moved_back_wrong, "delta", "contiguous direct"),
    ],
)
def test_faults_show(fault, name, way, monkeypatch):
    # The document that is cut is in the middle: a state goes through several segments.
    layout, lengths = ra.layouts.contiguous(60, 5), [12, 40, 8]
    if way == "contiguous direct":
        edges = [Run(a, a + 10) for a in range(0, 60, 10)]
        layout = Layout(60, (edges[::2], edges[1::2]))

    def slower(inputs):
        if "decay" in inputs:  # or little is left of a state after a segment
            inputs["decay"] *= 0.05

    assert max(both(MIXERS[name], layout, lengths, change=slower, way=way)[0].values()) < 1e-5
    fault(monkeypatch)
    try:
        errors, _ = both(MIXERS[name], layout, lengths, change=slower, way=way)
    except (TypeError, KeyError, AttributeError):
        return  # what was composed had no transition
    assert max(errors.values()) > 1e-3, errors


def test_normalised_linear_attention_is_a_weighted_mean():
    """And with positive random features it approaches softmax attention."""
    draw, n = torch.Generator().manual_seed(0), 30
    q, k, v = (torch.randn(1, n, 1, 4, generator=draw) for _ in range(3))
    layout = ra.layouts.zigzag(n, 3)
    segments = ra.make_segments(ra.masks.documents([19, 11]), layout)
    projection = torch.randn(20_000, 4, generator=draw)
    allowed = torch.from_numpy(ra.masks.documents([19, 11]).to_dense())
    weights = (q[0, :, 0] @ k[0, :, 0].T / 2).masked_fill(~allowed, -torch.inf).softmax(-1)
    want = weights @ v[0, :, 0]
    for phi, tolerance in ((features.performer, 0.1), (features.random_fourier, 0.1)):
        mapped = [phi(x / 2**0.5, projection) for x in (q, k)]

        def work(rank, mapped=mapped):
            own = [layout.shard(x, rank.rank) for x in (*mapped, v)]
            return linear(*own, segments=segments, group=rank, normalize=True, scale=1.0)

        out = layout.unshard(VirtualWorld(3, 60).run(work))
        assert float((out[0, :, 0] - want).norm() / want.norm()) < tolerance


def test_every_rank_takes_part_where_only_the_initial_state_is_trained():
    layout = ra.layouts.contiguous(20, 2)
    segments = ra.make_segments(ra.masks.causal(20), layout)
    found = _qkv(torch.Generator().manual_seed(0), 20, "scalar")
    want = found["initial"].clone().requires_grad_()
    plain = [found[x] for x in ("q", "k", "v", "decay")]
    naive.recurrence(*plain, None, want).square().sum().backward()

    def work(rank):
        initial = found["initial"].float().requires_grad_()
        own = [layout.shard(x, rank.rank).float() for x in plain]
        out = linear(*own, segments=segments, group=rank, scale=1.0, initial=initial)
        out.square().sum().backward()
        return initial.grad

    assert _apart(sum(VirtualWorld(2, 60).run(work)), want.grad) < 1e-5


def test_a_convolution_in_half_precision_with_weights_in_float32():
    x = torch.randn(1, 8, 3).bfloat16()
    assert conv(x, torch.randn(3, 2), torch.randn(3), segments=_one()).dtype == torch.bfloat16


def test_half_precision_has_states_in_float32():
    layout, draw = ra.layouts.contiguous(512, 2), torch.Generator().manual_seed(0)
    inputs = _qkv(draw, 512, "scalar")
    half = {name: x[:1].bfloat16() for name, x in inputs.items() if name != "initial"}
    want = naive.recurrence(*(half[x].double() for x in ("q", "k", "v", "decay", "beta")))
    segments = ra.make_segments(ra.masks.causal(512), layout)

    def work(rank):
        own = {name: layout.shard(x, rank.rank) for name, x in half.items()}
        return delta(**own, segments=segments, group=rank, scale=1.0)

    out = layout.unshard(VirtualWorld(2, 60).run(work))
    assert out.dtype == torch.bfloat16
    assert float((out.double() - want).norm() / want.norm()) < 4e-3


@pytest.mark.parametrize("name", MIXERS)
def test_autocast_leaves_states_in_float32(name):
    def automatic(f):
        def inside():
            with torch.autocast("cpu", torch.bfloat16):
                return f()

        return inside

    errors, _ = both(MIXERS[name], ra.layouts.zigzag(61, 2), [20, 41], wrap=automatic)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize(
    ("call", "shown"),
    [
        (lambda: ra.make_segments(ra.masks.causal(8), ra.layouts.striped(8, 2)), "of step 2"),
        (lambda: ra.make_segments(ra.masks.full(8), ra.layouts.zigzag(8, 2)), "must be causal"),
        (
            lambda: ra.make_segments(ra.masks.sliding_window(8, 3), ra.layouts.zigzag(8, 2)),
            "must be causal",
        ),
        (lambda: Segments(ra.layouts.zigzag(8, 2), [3, 4]), "documents of 7 tokens"),
        (lambda: _call(linear, decay=torch.zeros(2)), "decay must be"),
        (lambda: _call(linear, world=2), "segments of 2 ranks in a group of 1"),
        (lambda: _call(linear, tokens=7), "7 tokens, and rank 0 owns 8"),
        (lambda: _call(delta, beta=torch.zeros(1, 8)), "beta must be"),
        (lambda: conv(torch.zeros(1, 7, 3), torch.zeros(3, 2), segments=_one()), "conv: x must be"),
    ],
)
def test_what_does_not_fit_is_said(call, shown):
    with pytest.raises(ValueError, match=shown):
        call()


def _one(world=1):
    return ra.make_segments(ra.masks.causal(8), ra.layouts.contiguous(8, world))


def _call(mixer, tokens=8, world=1, **more):
    x = torch.zeros(1, tokens, 3, 4)
    group = None if world == 1 else VirtualWorld(1)
    del group
    return mixer(x, x, x, **more, segments=_one(world))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_on_real_processes(world):
    status, output = launch(world, ROOT / "tests/workers/states.py")
    assert status == 0, output


def test_the_page(capsys):
    page = (ROOT / "docs/mixers.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    scope = {}
    exec(compile(code, "docs/mixers.md", "exec"), scope)
    (shown,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    assert capsys.readouterr().out == shown
    assert [out.shape for out in scope["outs"]] == [(1, 16, 4, 8)] * 2
    page += (ROOT / "docs/families.md").read_text()
    for name in ra.mixers.__all__:
        assert re.search(rf"`{name}\b|\bmixers\.{name}\b|\b{name}\.py", page), name
