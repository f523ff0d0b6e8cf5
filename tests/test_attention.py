"""ring_attention against the float64 oracle, on virtual ranks of one process."""

import threading
import weakref

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from ringattn.kernels import pieces

import ringattn as ra
from ringattn import cost, kernels
from ringattn.execution import executor
from ringattn.execution.carriers import Counted, VirtualWorld
from ringattn.planning import schedules

from . import oracle
from .cases import KINDS, masks, plans

INTERPRETED = pytest.mark.skipif(
    torch.cuda.is_available(), reason="compiled for a GPU here: see test_triton.py"
)
THREE = ["aten", "reference", pytest.param("triton", marks=INTERPRETED)]


def inputs(
    n, heads=2, kv_heads=1, dim=8, dim_v=None, batch=2, dtype=torch.float32, seed=0, n_k=None
):
    """[q, k, v, dout]"""
    gen = torch.Generator().manual_seed(seed)
    n_k, dim_v = n if n_k is None else n_k, dim_v or dim
    shapes = [(n, heads, dim), (n_k, kv_heads, dim), (n_k, kv_heads, dim_v), (n, heads, dim_v)]
    return [torch.randn(batch, *s, generator=gen, dtype=torch.float64).to(dtype) for s in shapes]


def distributed(q, k, v, dout, plan, kernel="auto", scale=None, carrier=lambda rank: rank):
    """[out, dq, dk, dv] of all virtual ranks, put back together."""
    layouts = (plan.layout, plan.key_layout, plan.key_layout)

    def work(rank):
        own = [
            layout.shard(x, rank.rank).requires_grad_()
            for layout, x in zip(layouts, (q, k, v), strict=True)
        ]
        out = ra.ring_attention(*own, plan, group=carrier(rank), kernel=kernel, scale=scale)
        return out.detach(), *torch.autograd.grad(out, own, plan.layout.shard(dout, rank.rank))

    results = zip(*VirtualWorld(plan.world).run(work), strict=True)
    return [
        layout.unshard(parts)
        for layout, parts in zip((plan.layout, *layouts), results, strict=True)
    ]


def worst_error(q, k, v, dout, plan, kernel="auto", scale=None, error=oracle.error):
    want = oracle.attention(q, k, v, plan.mask.to_dense(), dout, scale)
    got = distributed(q, k, v, dout, plan, kernel, scale)
    return max(error(a, b) for a, b in zip(got, want, strict=True))


def drawn_inputs(data, plan, dtype=torch.float32):
    """Any number of heads that the plan's degree divides, grouped in any way."""
    groups = data.draw(st.sampled_from([1, 2, 3]))
    kv_heads = data.draw(st.sampled_from([1, 2, 4]))
    while kv_heads * groups % plan.ulysses:
        kv_heads += 1
    batch = data.draw(st.integers(1, 2))
    mask = plan.mask
    return inputs(mask.n_q, kv_heads * groups, kv_heads, batch=batch, dtype=dtype, n_k=mask.n_k)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_mask_any_layout_any_schedule_any_heads(data):
    plan = data.draw(plans())
    kernel = data.draw(st.sampled_from(["aten", "reference"]))
    assert worst_error(*drawn_inputs(data, plan), plan, kernel) <= 1e-5


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_many_ranks_with_fewer_tokens_than_ranks(data):
    plan = data.draw(plans(max_world=64))
    assert worst_error(*drawn_inputs(data, plan), plan) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", list(schedules.BUILDERS))
def test_float64_is_exact_for_every_schedule_mask_and_odd_world(schedule, kind):
    turn = list(schedules.BUILDERS).index(schedule)
    layouts = [ra.layouts.NAMES[(turn + i) % 4] for i in range(5)]

    @settings(max_examples=1, deadline=None, derandomize=True, phases=[Phase.generate])
    @given(st.data())
    def check(data):
        mask = data.draw(masks(97, [kind]).filter(lambda mask: mask.n_q > 20))
        for world, name in zip((1, 3, 5, 7, 9), layouts, strict=True):
            layout = ra.layouts.build(name, mask, world)
            same = mask.n_q == mask.n_k
            keys = layout if same else ra.layouts.striped(mask.n_k, world)
            layout = layout if same else ra.layouts.striped(mask.n_q, world)
            node = 3 if world == 9 else world
            for ulysses in {1, node}:
                plan = ra.make_plan(
                    mask, layout, schedule, ulysses, key_layout=keys, node_size=node
                )
                tensors = inputs(
                    mask.n_q, 2 * ulysses, 2, batch=1, dtype=torch.float64, n_k=mask.n_k
                )
                assert worst_error(*tensors, plan, "reference") <= 1e-10

    check()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_bytes_are_those_of_the_plan(data):
    """What really arrives, forward and backward, on every rank: the plan's count, to the byte."""
    plan = data.draw(plans())
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    q, k, v, dout = drawn_inputs(data, plan, dtype)
    v, dout = v[..., :3].contiguous(), dout[..., :3].contiguous()
    counters = {}

    def counting(rank):
        counters[rank.rank] = Counted(rank)
        return counters[rank.rank]

    distributed(q, k, v, dout, plan, carrier=counting)
    shape = cost.AttentionShape(q.shape[2], k.shape[2], 8, 3, q.itemsize, q.shape[0])
    for rank in range(plan.world):
        want = cost.received(plan, rank, shape)
        assert counters[rank].received == want.forward + want.backward
        if plan.schedule == "direct":
            rows = sum(move.tokens for step in plan.steps(rank) for move in step.recvs)
            assert rows == cost.lower_bound(plan, rank)


@pytest.mark.parametrize("schedule", list(schedules.BUILDERS))
def test_blocks_live_no_longer_than_the_plan_says(schedule, monkeypatch):
    """Counts the rows of K/V buffers that are alive whenever an exchange starts."""
    plan = ra.make_plan(ra.masks.causal(64), ra.layouts.zigzag(64, 8), schedule, node_size=4)
    alive, peaks, make = {}, {}, executor._empty
    here = threading.local()

    def tracked(like, tokens, dtype):
        pair = make(like, tokens, dtype)
        alive.setdefault(here.rank, []).append(weakref.ref(pair[0]))
        return pair

    class Watching(Counted):
        def start(self, sends, recvs, label):
            here.rank = self.rank
            rows = [x.shape[1] for ref in alive.get(self.rank, []) if (x := ref()) is not None]
            peaks[self.rank] = max(peaks.get(self.rank, 0), sum(rows))
            return super().start(sends, recvs, label)

    monkeypatch.setattr(executor, "_empty", tracked)
    q, k, v, _ = inputs(64)

    def work(rank):
        here.rank = rank.rank
        with torch.no_grad():
            own = (plan.layout.shard(x, rank.rank) for x in (q, k, v))
            return ra.ring_attention(*own, plan, group=Watching(rank))

    VirtualWorld(8).run(work)
    for rank in range(8):
        assert peaks[rank] == cost.buffers(plan.rank(rank)).kv


@settings(max_examples=30, deadline=None)
@given(plans(max_n=60))
def test_every_rank_starts_the_same_exchanges_in_the_same_order(plan):
    labels = {}

    class Recording(Counted):
        def start(self, sends, recvs, label):
            labels.setdefault(self.rank, []).append(label)
            return super().start(sends, recvs, label)

    heads = 2 * plan.ulysses
    tensors = inputs(plan.mask.n_q, heads, 1, batch=1, n_k=plan.mask.n_k)
    distributed(*tensors, plan, carrier=Recording)
    assert all(labels[rank] == labels[0] for rank in range(plan.world))


@pytest.mark.parametrize("dim", [32, 64, 128, 256])
@pytest.mark.parametrize("schedule", list(schedules.BUILDERS))
def test_head_dims(schedule, dim):
    mask = ra.masks.causal(150)
    plan = ra.make_plan(mask, ra.layouts.balanced(mask, 4), schedule, 2, node_size=2)
    assert worst_error(*inputs(150, 4, 1, dim), plan, "aten") <= 1e-5
    assert worst_error(*inputs(150, 4, 1, dim, dim // 2 + 3), plan, "reference") <= 1e-5


@pytest.mark.parametrize("world", [1, 3, 5])
@pytest.mark.parametrize("name", list(ra.layouts.BUILDERS))
def test_long_enough_for_every_kind_of_piece(world, name):
    n = 1100  # several tiles, not a multiple of one
    for mask in (
        ra.masks.causal(n),
        ra.masks.sliding_window(n, 700),
        ra.masks.sliding_window(n, 90, causal=False),
        ra.masks.documents([1, 450, 649]),
    ):
        plan = ra.make_plan(mask, ra.layouts.BUILDERS[name](n, world))
        assert worst_error(*inputs(n, 2, 1), plan, "aten") <= 1e-5


def test_value_head_dim_may_differ():
    plan = ra.make_plan(ra.masks.causal(300), ra.layouts.zigzag(300, 3))
    for kernel in ("aten", "reference"):
        assert worst_error(*inputs(300, 4, 2, 8, 24), plan, kernel) <= 1e-5


def test_a_plan_for_more_ranks_than_there_are_says_what_is_missing():
    plan = ra.make_plan(ra.masks.causal(8), ra.layouts.zigzag(8, 2))
    q = torch.zeros(1, 4, 1, 8)
    shown = "for 2 ranks, the group has 1; torch.distributed is not initialized: .*torchrun"
    with pytest.raises(ValueError, match=shown):
        ra.ring_attention(q, q, q, plan)
    with pytest.raises(ValueError, match=r"for 2 ranks, the group has 3$"):
        VirtualWorld(3).run(lambda rank: ra.ring_attention(q, q, q, plan, group=rank))


def bf16_growth(kernel, schedule="ring", ulysses=1, mask=None):
    """Of out, dq, dk, dv: the error on up to 16 ranks over that of one kernel call, bf16 inputs."""
    mask = mask or ra.masks.causal(512)
    n = mask.n_q
    tensors = inputs(n, 4, 1, 32, batch=1, dtype=torch.bfloat16)
    want = oracle.attention(*tensors[:3], mask.to_dense(), tensors[3])
    growth = []
    for world in (1, 2, 4, 8, 16):
        plan = ra.make_plan(
            mask,
            ra.layouts.zigzag(n, world),
            schedule,
            min(ulysses, world),
            node_size=min(2, world),
        )
        got = distributed(*tensors, plan, kernel)
        errors = [oracle.rms_error(a, b) for a, b in zip(got, want, strict=True)]
        growth.append(errors)
    return max(a / b for errors in growth for a, b in zip(errors, growth[0], strict=True))


@pytest.mark.parametrize("kernel", ["aten", "reference"])
@pytest.mark.parametrize("schedule", list(schedules.BUILDERS))
def test_bf16_error_does_not_grow_with_the_ranks(schedule, kernel):
    assert bf16_growth(kernel, schedule) <= 1.1


def test_bf16_error_does_not_grow_with_split_heads_or_other_masks():
    """Four heads over one replicated K/V head; packed documents with a window."""
    docs = ra.masks.documents([100, 300, 112]) & ra.masks.sliding_window(512, 150)
    assert bf16_growth("aten", "direct", ulysses=4) <= 1.1
    assert bf16_growth("aten", "ring", ulysses=2, mask=docs) <= 1.1


@pytest.mark.parametrize("kernel", ["aten", "reference"])
def test_mutant_output_rounded_at_every_hop(monkeypatch, kernel):
    module = kernels.select(kernel, torch.float32, torch.device("cpu"), 8)
    forward = module.forward

    def rounding(out, **given):
        forward(out=out, **given)
        out.copy_(out.bfloat16())

    monkeypatch.setattr(module, "forward", rounding)
    assert bf16_growth(kernel) > 1.1


@pytest.mark.parametrize("kernel", THREE)
@pytest.mark.parametrize(
    ("schedule", "ulysses", "softcap", "sinks"),
    [("ring", 1, 2.0, False), ("ring", 1, 0.0, True), ("direct", 2, 3.0, True)],
)
def test_softcap_and_sinks(kernel, schedule, ulysses, softcap, sinks):
    """Also for rows without any key, and for sinks that outweigh everything."""
    mask = ra.masks.documents([9, 20]) - ra.masks.from_slices(ra.masks.full(2, 29).slices, 29, 29)
    plan = ra.make_plan(mask, ra.layouts.zigzag(29, 4), schedule, ulysses)
    q, k, v, dout = inputs(29, 4, 1, 16, batch=2)
    logits = torch.tensor([-3.0, 0.5, 4.0, 30.0]) if sinks else None

    def work(rank):
        own = [plan.layout.shard(x, rank.rank).requires_grad_() for x in (q, k, v)]
        own += [logits.clone().requires_grad_()] if sinks else []
        ends = {"softcap": softcap or None, "sinks": own[3] if sinks else None}
        out, lse = ra.ring_attention(
            *own[:3], plan, group=rank, kernel=kernel, return_lse=True, **ends
        )
        grads = torch.autograd.grad(out, own, plan.layout.shard(dout, rank.rank))
        return out.detach(), *grads[:3], lse, *grads[3:]

    parts = list(zip(*VirtualWorld(4).run(work), strict=True))
    got = [plan.layout.unshard(x) for x in parts[:4]] + [sum(x) for x in parts[5:]]
    want = oracle.attention(q, k, v, mask.to_dense(), dout, None, softcap, logits)
    assert max(oracle.error(a, b) for a, b in zip(got, want, strict=True)) <= 1e-5
    lse = plan.layout.unshard(parts[4], 2)
    empty = logits[:, None].expand(4, 2) if sinks else torch.full((4, 2), -torch.inf)
    torch.testing.assert_close(lse[..., :2], empty.expand(2, 4, 2))


@pytest.mark.parametrize("kernel", THREE)
def test_autocast_rounds_nothing_inside(kernel):
    plan = ra.make_plan(ra.masks.causal(20), ra.layouts.zigzag(20, 1))
    *own, dout = inputs(20, dim=16)
    own = [x.requires_grad_() for x in own]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = ra.ring_attention(*own, plan, kernel=kernel, softcap=5.0)
            results.append([out, *torch.autograd.grad(out, own, dout)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("scale", [-0.5, 0.0, float("nan")])
def test_a_scale_that_is_not_positive_is_refused(scale):
    """torch's flash operator and the Triton kernels would give NaN or worse."""
    q, k, v, _ = inputs(16)
    plan = ra.make_plan(ra.masks.causal(16), ra.layouts.zigzag(16, 1))
    with pytest.raises(ValueError, match=r"scale must be positive and finite.*negate q"):
        ra.ring_attention(q, k, v, plan, scale=scale)


def test_a_second_derivative_is_refused():
    q, k, v, _ = (x.requires_grad_() for x in inputs(16))
    out = ra.ring_attention(q, k, v, ra.make_plan(ra.masks.causal(16), ra.layouts.zigzag(16, 1)))
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dq.sum().backward()


def test_forward_mode_is_refused():
    """It would else give a derivative of 0."""
    plan = ra.make_plan(ra.masks.causal(8), ra.layouts.zigzag(8, 1))
    q, k, v, _ = inputs(8)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: ra.ring_attention(x, k, v, plan), (q,), (q,))
    with torch.autograd.forward_ad.dual_level():
        assert ra.ring_attention(q, k, v, plan).shape == q.shape
        dual = torch.autograd.forward_ad.make_dual(v, v)
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            ra.ring_attention(q, k, dual, plan)


@pytest.mark.parametrize("kernel", ["aten", "reference"])
def test_log_sum_exp_gaps_stay_finite(kernel):
    q, k, v, dout = inputs(64, 1, 1, 8)
    k[:, 40:] *= 1e4  # scores of +-1e4 and more beside scores near 0
    plan = ra.make_plan(ra.masks.causal(64), ra.layouts.contiguous(64, 4))
    # float32 scores of 1e4 are themselves only good to about 1e-3.
    assert worst_error(q, k, v, dout, plan, kernel) <= 1e-2


@pytest.mark.parametrize("kernel", ["aten", "reference"])
def test_any_strides(kernel):
    """Views whose head_dim is not dense, and the gradient of sum(), which has stride 0."""
    n = 200
    plan = ra.make_plan(ra.masks.causal(n), ra.layouts.zigzag(n, 3))
    q, k, v, dout = (
        x.transpose(2, 3).contiguous().transpose(2, 3) for x in inputs(n, heads=4, kv_heads=2)
    )
    assert worst_error(q, k, v, dout, plan, kernel) <= 1e-5
    assert worst_error(q, k, v, torch.ones(1).expand_as(dout), plan, kernel) <= 1e-5


def test_rows_without_keys_give_zero_and_minus_infinity():
    mask = ra.masks.full(8) - ra.masks.from_slices([ra.masks.full(4, 8).slices[0]], 8, 8)
    q, k, v, _ = inputs(8)
    out, lse = ra.ring_attention(
        q, k, v, ra.make_plan(mask, ra.layouts.contiguous(8, 1)), return_lse=True
    )
    assert (out[:, :4] == 0).all()
    assert (lse[..., :4] == -torch.inf).all()
    assert lse[..., 4:].isfinite().all() and lse.shape == (2, 2, 8) and lse.dtype == torch.float32


@pytest.mark.parametrize("schedule", list(schedules.BUILDERS))
def test_same_inputs_same_bits(schedule):
    layout = ra.layouts.zigzag(300, 6)
    plan = ra.make_plan(ra.masks.causal(300), layout, schedule, 2, node_size=2)
    first, second = (distributed(*inputs(300), plan, scale=0.2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_local_tensors_are_saved():
    q, k, v, _ = (x.requires_grad_() for x in inputs(64))
    plan = ra.make_plan(ra.masks.causal(64), ra.layouts.zigzag(64, 1))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape), lambda x: x):
        ra.ring_attention(q, k, v, plan)
    assert sorted(saved) == sorted([q.shape, k.shape, v.shape, q.shape, (2, 2, 64)])


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 70), st.integers(-70, 70), st.integers(-70, 70),
    st.sampled_from([2, 4, 5]),
)  # fmt: skip
def test_pieces_cover_a_band_exactly_once(n_q, n_k, lo, hi, tile):
    i, j = torch.arange(n_q)[:, None], torch.arange(n_k)[None, :]
    want = ((j - i >= lo) & (j - i <= hi)).int()
    got = torch.zeros(n_q, n_k, dtype=torch.int)
    for piece in pieces.cut(n_q, n_k, lo, hi, tile) if want.any() else []:
        row, col = torch.arange(piece.rows)[:, None], torch.arange(piece.keys)[None, :]
        inside = torch.ones(piece.rows, piece.keys, dtype=torch.bool)
        if piece.lo is not None:
            inside &= col - row >= piece.lo
        if piece.hi is not None:
            inside &= col - row <= piece.hi
        assert inside.any(1).all()
        for block in range(piece.count):
            q, k = piece.q + block * piece.stride, piece.k + block * piece.stride
            got[q : q + piece.rows, k : k + piece.keys] += inside.int()
    assert torch.equal(got, want)


def test_idle_sides_of_a_band_cut_nothing_off():
    """A causal block is one triangle and the one beside it one rectangle, whatever their bounds."""
    plan = ra.make_plan(ra.masks.causal(4096), ra.layouts.zigzag(4096, 2))
    for step in plan.steps(1):
        for band in step.bands:
            found = list(pieces.cut(len(band.q), len(band.k), band.lo, band.hi))
            assert min(piece.rows for piece in found) >= pieces.TILE
            assert len(found) == (1 if band.is_full else 6)


def test_masked_remainders_are_a_small_part_of_the_work():
    n = 8192
    masked = sum(
        p.rows * p.keys * p.count
        for p in pieces.cut(n, n, -n, 0)
        if p.lo is not None or p.hi is not None
    )
    assert masked <= 2 * pieces.TILE * n
    assert len(list(pieces.cut(n, n, -n, 0))) < 10


# --- the tests above have teeth: each of these mistakes must show ---


def test_mutant_kv_of_the_previous_step(monkeypatch):
    walk = executor._walk

    def stale(own, run):
        before = own
        for index, step, held in walk(own, run):
            yield index, step, before if before[0].shape == held[0].shape else held
            before = held

    monkeypatch.setattr(executor, "_walk", stale)
    plan = ra.make_plan(ra.masks.causal(64), ra.layouts.zigzag(64, 4))
    assert worst_error(*inputs(64), plan) > 1e-2


@pytest.mark.parametrize("kernel", ["aten", "reference"])
def test_mutant_log_sum_exp_of_the_block_in_the_backward(monkeypatch, kernel):
    module = kernels.select(kernel, torch.float32, torch.device("cpu"), 8)
    backward, prepare = module.backward, module.prepare

    def per_block(prepared, **given):
        q, k, v, bands, scores = (given[name] for name in ("q", "k", "v", "bands", "scores"))
        own = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf)
        module.forward(q, k, v, bands, None, torch.zeros_like(given["dout"]), own, scores)
        backward(prepared=prepare(*prepared, own), **given)

    monkeypatch.setattr(module, "prepare", lambda dout, out, lse: (dout, out))
    monkeypatch.setattr(module, "backward", per_block)
    plan = ra.make_plan(ra.masks.causal(64), ra.layouts.zigzag(64, 4))
    assert worst_error(*inputs(64), plan, kernel) > 1e-2


def test_mutant_band_off_by_one():
    tensors = inputs(64)
    shifted = ra.masks.from_slices(
        [ra.masks.Slice.make(s.q, s.k, s.lo, s.hi - 1) for s in ra.masks.causal(64).slices], 64, 64
    )
    got = distributed(*tensors, ra.make_plan(shifted, ra.layouts.zigzag(64, 4)))
    want = oracle.attention(*tensors[:3], ra.masks.causal(64).to_dense(), tensors[3])
    assert max(oracle.error(a, b) for a, b in zip(got, want, strict=True)) > 1e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[:, 1:], k, v), "q has 15 tokens"),
        (lambda q, k, v: (q[0], k, v), "must be"),
        (lambda q, k, v: (q, k[:, :, [0, 0, 0]], v), "equal numbers of heads"),
        (lambda q, k, v: (q, k.double(), v), "share batch, dtype"),
        (lambda q, k, v: (q, k[..., 1:], v), "one head_dim"),
        (lambda q, k, v: (q.long(), k.long(), v.long()), "floating-point"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    plan = ra.make_plan(ra.masks.causal(16), ra.layouts.zigzag(16, 1))
    q, k, v, _ = inputs(16)
    with pytest.raises(ValueError, match=message):
        ra.ring_attention(*change(q, k, v), plan)


def test_softcap_and_sinks_that_do_not_fit():
    plan = ra.make_plan(ra.masks.causal(16), ra.layouts.zigzag(16, 1))
    q, k, v, _ = inputs(16)
    with pytest.raises(ValueError, match=r"softcap must be positive.*got -1"):
        ra.ring_attention(q, k, v, plan, softcap=-1.0)
    for sinks in (torch.zeros(3), torch.zeros(2, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"one floating-point logit per head, \[2\]"):
            ra.ring_attention(q, k, v, plan, sinks=sinks)


def test_unknown_kernel_and_wrong_world():
    q, k, v, _ = inputs(16)
    plan = ra.make_plan(ra.masks.causal(16), ra.layouts.zigzag(16, 1))
    with pytest.raises(ValueError, match="auto, gluon, triton, aten, reference"):
        ra.ring_attention(q, k, v, plan, kernel="cudnn")
    with pytest.raises(ValueError, match="plan is for 2 ranks"):
        ra.ring_attention(q, k, v, ra.make_plan(ra.masks.causal(16), ra.layouts.zigzag(16, 2)))


@pytest.mark.parametrize("own", [None, ValueError("mine")])
def test_a_rank_that_ends_without_taking_part_ends_its_peers(own):
    """At once, with the step and the peer; and what it raised itself is what is told."""
    plan = ra.make_plan(ra.masks.causal(10), ra.layouts.zigzag(10, 3))
    q, k, v, _ = inputs(10)

    def work(rank):
        if rank.rank == 1:
            if own:
                raise own
            return
        ra.ring_attention(*(plan.layout.shard(x, rank.rank) for x in (q, k, v)), plan, group=rank)

    message = "mine" if own else "exchange of K/V, step 0 failed: from rank 1.*: rank 1 has ended"
    with pytest.raises(type(own) if own else ConnectionError, match=message):
        VirtualWorld(3, timeout=60).run(work)
