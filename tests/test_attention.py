"""ring_attention against the float64 oracle, on virtual ranks of one process."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ringattn.kernels import pieces

import ringattn as ra
from ringattn import attention
from ringattn.comm import VirtualWorld

from . import oracle
from .cases import layouts, masks


def inputs(n, heads=2, kv_heads=1, dim=8, dim_v=None, batch=2, dtype=torch.float32, seed=0):
    gen = torch.Generator().manual_seed(seed)
    shapes = [(heads, dim), (kv_heads, dim), (kv_heads, dim_v or dim), (heads, dim_v or dim)]
    return [torch.randn(batch, n, *s, generator=gen, dtype=torch.float64).to(dtype) for s in shapes]


def distributed(q, k, v, dout, plan, kernel="auto", scale=None):
    """[out, dq, dk, dv] of all virtual ranks, put back together."""
    layout = plan.layout

    def work(rank):
        own = [layout.shard(x, rank.rank).requires_grad_() for x in (q, k, v)]
        out = ra.ring_attention(*own, plan, group=rank, kernel=kernel, scale=scale)
        return out.detach(), *torch.autograd.grad(out, own, layout.shard(dout, rank.rank))

    results = VirtualWorld(plan.world, timeout=20).run(work)
    return [layout.unshard(parts) for parts in zip(*results, strict=True)]


def worst_error(q, k, v, dout, plan, kernel="auto", scale=None, error=oracle.error):
    want = oracle.attention(q, k, v, plan.mask.to_dense(), dout, scale)
    got = distributed(q, k, v, dout, plan, kernel, scale)
    return max(error(a, b) for a, b in zip(got, want, strict=True))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_mask_any_layout_any_heads(data):
    mask = data.draw(masks())
    layout = data.draw(layouts(mask.n_q, max_world=8))
    kv_heads, groups = data.draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (4, 1)]))
    kernel = data.draw(st.sampled_from(["aten", "reference"]))
    tensors = inputs(mask.n_q, kv_heads * groups, kv_heads, batch=data.draw(st.integers(1, 2)))
    assert worst_error(*tensors, ra.make_plan(mask, layout), kernel) <= 1e-5


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_many_ranks_with_fewer_tokens_than_ranks(data):
    mask = data.draw(masks())
    layout = data.draw(layouts(mask.n_q, max_world=64))
    assert worst_error(*inputs(mask.n_q, batch=1), ra.make_plan(mask, layout)) <= 1e-5


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


@pytest.mark.parametrize("world", [3, 7])
def test_float64_ring_is_exact(world):
    mask = ra.masks.documents([30, 1, 66]) | ra.masks.sinks(97, 2)
    for make in ra.layouts.BUILDERS.values():
        tensors = inputs(97, 4, 2, dtype=torch.float64)
        assert worst_error(*tensors, ra.make_plan(mask, make(97, world))) < 1e-12


def test_value_head_dim_may_differ():
    plan = ra.make_plan(ra.masks.causal(300), ra.layouts.zigzag(300, 3))
    for kernel in ("aten", "reference"):
        assert worst_error(*inputs(300, 4, 2, 8, 24), plan, kernel) <= 1e-5


def bf16_growth(kernel):
    """Error of rings of up to 16 ranks over that of one rank, bf16 inputs."""
    n = 512
    tensors = inputs(n, 2, 1, 32, dtype=torch.bfloat16)
    layouts = [ra.layouts.zigzag(n, world) for world in (1, 2, 4, 8, 16)]
    plans = [ra.make_plan(ra.masks.causal(n), layout) for layout in layouts]
    errors = [worst_error(*tensors, plan, kernel, error=oracle.rms_error) for plan in plans]
    return max(errors) / errors[0]


@pytest.mark.parametrize("kernel", ["aten", "reference"])
def test_bf16_error_does_not_grow_with_the_ring(kernel):
    assert bf16_growth(kernel) <= 1.1


@pytest.mark.parametrize("kernel", ["aten", "reference"])
def test_mutant_output_rounded_at_every_hop(monkeypatch, kernel):
    module = ra.kernels.KERNELS[kernel]
    forward = module.forward

    def rounding(q, k, v, slices, out, *rest):
        forward(q, k, v, slices, out, *rest)
        out.copy_(out.bfloat16())

    monkeypatch.setattr(module, "forward", rounding)
    assert bf16_growth(kernel) > 1.1


def test_a_second_derivative_is_refused():
    q, k, v, _ = (x.requires_grad_() for x in inputs(16))
    out = ra.ring_attention(q, k, v, ra.make_plan(ra.masks.causal(16), ra.layouts.zigzag(16, 1)))
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


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


def test_same_inputs_same_bits():
    plan = ra.make_plan(ra.masks.causal(300), ra.layouts.zigzag(300, 5))
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
    walk = attention._walk

    def stale(steps, own, comm):
        before = own
        for step, held in walk(steps, own, comm):
            yield step, before if before[0].shape == held[0].shape else held
            before = held

    monkeypatch.setattr(attention, "_walk", stale)
    plan = ra.make_plan(ra.masks.causal(64), ra.layouts.zigzag(64, 4))
    assert worst_error(*inputs(64), plan) > 1e-2


@pytest.mark.parametrize("kernel", ["aten", "reference"])
def test_mutant_log_sum_exp_of_the_block_in_the_backward(monkeypatch, kernel):
    module = ra.kernels.KERNELS[kernel]
    backward = module.backward

    def per_block(dout, q, k, v, out, lse, slices, *rest):
        own = torch.full_like(lse, -torch.inf)
        module.forward(q, k, v, slices, torch.zeros_like(out), own, rest[-1])
        backward(dout, q, k, v, out, own, slices, *rest)

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


def test_unknown_kernel_and_wrong_world():
    q, k, v, _ = inputs(16)
    plan = ra.make_plan(ra.masks.causal(16), ra.layouts.zigzag(16, 1))
    with pytest.raises(ValueError, match="auto, aten, reference"):
        ra.ring_attention(q, k, v, plan, kernel="cudnn")
    with pytest.raises(ValueError, match="plan is for 2 ranks"):
        ra.ring_attention(q, k, v, ra.make_plan(ra.masks.causal(16), ra.layouts.zigzag(16, 2)))
