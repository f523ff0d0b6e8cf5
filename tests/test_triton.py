"""The Triton kernels in Triton's interpreter, against the float64 oracle; on a GPU where there is
one. The interpreter treats bfloat16 as raw integers, so half precision is float16 here."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ringattn.kernels import Scores, call, triton
from ringattn.kernels.launch import Launch
from ringattn.kernels.triton import calls, fwd
from ringattn.kernels.work import work

import ringattn as ra
from ringattn.planning.runs import Run
from ringattn.planning.slices import Band, Bands

from . import oracle
from .cases import masks, plans
from .test_attention import distributed, inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMIT = {torch.float32: 1e-5, torch.float16: 1.5e-3}  # of gap, and of oracle.half_error


def bands_of(mask):
    return [band for part in mask.slices for band in part.bands()]


def one_rank(q, k, v, dout, steps, scale=None, softcap=0.0):
    """[out, dq, dk, dv] of one rank that is given the bands in several steps."""
    scores = Scores(q.shape[-1] ** -0.5 if scale is None else scale, softcap)
    q, k, v, dout = (x.to(DEVICE) for x in (q, k, v, dout))
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, device=DEVICE)
    partial = None
    for index, bands in enumerate(steps):
        last = index == len(steps) - 1
        if last or partial is None:
            # Poisoned: what is not written shows.
            out = torch.full_like(dout, torch.nan, dtype=q.dtype if last else torch.float32)
        triton.forward(q, k, v, bands, partial, out, lse, scores)
        partial = out
    prepared = triton.prepare(dout, out, lse)
    dtype = q.dtype if len(steps) == 1 else torch.float32
    dq = torch.full(q.shape, torch.nan, device=DEVICE)
    dk, dv = (torch.full(x.shape, torch.nan, dtype=dtype, device=DEVICE) for x in (k, v))
    for index, bands in enumerate(steps):
        ends = (scores, index > 0, index > 0)
        triton.backward(dout, q, k, v, prepared, bands, dq, dk, dv, *ends)
    dq = triton.finish(dq, q.dtype, scores)
    return [x.cpu() for x in (out, dq, dk, dv)]


def gap(got, want):
    return max(oracle.error(a, b) for a, b in zip(got, want, strict=True))


def checked(mask, tensors, steps=None, **ends):
    """The error against float64, over its limit."""
    got = one_rank(*tensors, steps or [bands_of(mask)], **ends)
    asked = (*tensors[:3], mask.to_dense(), tensors[3])
    want, dtype = oracle.attention(*asked, **ends), tensors[0].dtype
    half = dtype == torch.float16
    return (oracle.half_error(got, want, *asked, **ends) if half else gap(got, want)) / LIMIT[dtype]


# --- work lists ---


def covered(bands, rows, columns, m, n, transposed, everything):
    """How often the work list has each pair; checks every visit on the way."""
    made = work(bands, rows, m, n, transposed, everything)
    count = np.zeros((rows, columns), dtype=int)
    seen = np.zeros(rows, dtype=int)
    weights = []
    for first, begin, end in made.tiles:
        tokens = (first + np.arange(m) * made.row_step)[np.arange(m) * made.row_step < rows - first]
        seen[tokens] += 1
        weights.append(made.visits[begin:end, 9].sum())
        for visit in made.visits[begin:end]:
            start, step, length, k_start, k_step, k_length, lo, hi, j, tiles, f0, f1 = visit
            apart = tokens - start
            i = np.where((apart >= 0) & (apart % step == 0), apart // step, -1)
            real = (i >= 0) & (i < length)
            assert real.any() and tiles > 0 and 0 <= f0 <= f1 <= tiles
            for tile in range(tiles):
                c = j + tile * n + np.arange(n)
                d = c[None] - i[:, None]
                ok = real[:, None] & (c < k_length)[None] & (d >= lo) & (d <= hi)
                assert ok.any()  # no tile outside of the band
                if f0 <= tile < f1:
                    assert ok.all()  # nor one with a mask that is called full
                at_row, at_column = np.nonzero(ok)
                count[tokens[at_row], k_start + c[at_column] * k_step] += 1
    assert (seen <= 1).all() and (not everything or (seen == 1).all())
    assert weights == sorted(weights, reverse=True) and (everything or all(weights))
    return count, made


@settings(max_examples=250, deadline=None)
@given(masks(max_n=60), st.sampled_from([1, 4, 8, 16]), st.sampled_from([2, 4, 16]), st.booleans())
def test_work_lists_have_every_pair_once_and_no_tile_in_vain(mask, m, n, everything):
    bands = bands_of(mask)
    if not bands:
        return
    dense = mask.to_dense()
    count, _ = covered(bands, mask.n_q, mask.n_k, m, n, False, everything)
    assert (count == dense).all()
    count, _ = covered(bands, mask.n_k, mask.n_q, m, n, True, everything)
    assert (count == dense.T).all()


@settings(max_examples=100, deadline=None)
@given(plans(max_n=80, max_world=5, ulysses=False), st.data())
def test_work_lists_of_the_steps_of_a_plan(plan, data):
    rank = data.draw(st.integers(0, plan.world - 1))
    own = plan.rank(rank)
    for step in own.steps:
        if step.bands:
            rows = plan.layout.count(rank)
            count, made = covered(step.bands, rows, own.blocks[step.block], 8, 4, False, False)
            assert count.sum() == sum(band.area for band in step.bands)
            assert made.stepped or all(b.q.step == b.k.step == 1 for b in step.bands)


def test_a_band_of_one_row_is_met_by_the_tiles_of_its_progression_alone():
    """Beside bands that step, it is in one residue of three."""
    bands = [
        Band(Run(first, stop, 3), Run(first, stop, 3), 0, 0)
        for first, stop in ((0, 4), (1, 5), (5, 9), (6, 10))
    ]
    bands += [Band(Run(at, at + 1), Run(at, at + 1), -1, 1) for at in (2, 7)]
    count, made = covered(bands, 11, 11, 8, 4, False, False)
    assert count.sum() == 10 and len(made.visits) == 6


def test_full_tiles_are_what_a_causal_mask_has():
    n, m = 4096, 128
    made = work(bands_of(ra.masks.causal(n)), n, m, m, False, True)
    assert made.columns == sum(range(1, 33))
    assert (made.visits[:, 11] - made.visits[:, 10]).sum() == sum(range(32))


def test_dilated_masks_fill_their_tiles():
    """Tiles step with the mask: no more of them than the pairs need, but for the edges."""
    n, dilation = 4096, 8
    made = work(bands_of(ra.masks.dilated(n, 64, dilation)), n, 64, 64, False, True)
    assert made.row_step == dilation and made.stepped
    assert made.columns <= 2 * dilation * (n // dilation // 64)


def test_work_lists_are_kept_with_the_plan():
    plan = ra.make_plan(ra.masks.causal(64), ra.layouts.zigzag(64, 2))
    bands = plan.steps(0)[0].bands
    line = Launch(16, 16, 1, 1)
    first, second = (
        calls._listed(bands, 32, line, False, True, torch.device("cpu")) for _ in range(2)
    )
    assert first is second and plan.steps(0)[0].bands.halves[0] is bands.halves[0]


# --- the kernels ---


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_bands_heads_and_steps(data):
    """Any mask, grouped heads, odd lengths and head_dims; the bands dealt over up to 3 steps."""
    mask = data.draw(masks(max_n=44))
    bands = bands_of(mask)
    if not bands:
        return
    kv_heads, group = data.draw(st.sampled_from([(1, 1), (1, 2), (2, 1)]))
    dim, dim_v = data.draw(st.tuples(*[st.sampled_from([1, 7, 16, 24, 48])] * 2))
    dtype = data.draw(st.sampled_from(list(LIMIT)))
    parts = data.draw(st.integers(1, 3))
    steps = [part for part in (bands[i::parts] for i in range(parts)) if part]
    batch = data.draw(st.integers(1, 2))
    tensors = inputs(mask.n_q, kv_heads * group, kv_heads, dim, dim_v, batch, dtype, n_k=mask.n_k)
    assert checked(mask, tensors, steps) <= 1


def test_a_gradient_that_all_but_cancels_is_not_held_against_half_precision():
    """dq is off by what rounding out does: 0.4 % of dq, and far less of what it is summed from."""
    mask = ra.masks.from_slices([((16, 37), (0, 2), None, None)], 37, 37)
    tensors = inputs(37, 2, 1, 1, 1, 2, torch.float16)
    want = oracle.attention(*tensors[:3], mask.to_dense(), tensors[3])
    assert oracle.error(one_rank(*tensors, [bands_of(mask)])[1], want[1]) > 3e-3
    assert checked(mask, tensors) <= 1


@pytest.mark.parametrize("dtype", list(LIMIT))
@pytest.mark.parametrize(
    ("dim", "dim_v"), [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256), (80, 40)]
)
def test_head_dims(dim, dim_v, dtype):
    """In two steps, so that every half of a head is also added to."""
    steps = [
        [Band.make(Run(0, 37), Run(0, 20), -40, 0)],
        [Band.make(Run(20, 37), Run(20, 37), -40, 0)],
    ]
    assert checked(ra.masks.causal(37), inputs(37, 2, 1, dim, dim_v, 1, dtype), steps) <= 1


@pytest.mark.parametrize("dtype", list(LIMIT))
def test_long_rows(dtype):
    """Several tiles without a mask in a row, in every pass; the last tiles are ragged."""
    mask = ra.masks.causal(150)
    assert checked(mask, inputs(150, 1, 1, 16, 16, 1, dtype)) <= 1


@pytest.mark.parametrize("cut", [(16, 16, False), (32, 16, True), (16, 64, True)])
def test_tiles_of_any_shape(monkeypatch, cut):
    m, n, overlap = cut
    line = Launch(m, n, 1, 1, overlap=overlap, precision="ieee")
    monkeypatch.setattr(calls, "launch", lambda *_: line)
    mask = ra.masks.sliding_window(70, 45) | ra.masks.sinks(70, 3)
    bands = bands_of(mask)
    assert checked(mask, inputs(70, 1, 1, 16, 16, 1), [bands[:1], bands[1:]]) <= 1


@pytest.mark.parametrize("schedule", ["ring", "direct"])
def test_virtual_ranks(schedule):
    docs = ra.masks.documents([9, 30, 26])
    plan = ra.make_plan(docs, ra.layouts.zigzag(65, 3), schedule)
    tensors = inputs(65, 2, 1, 16, batch=1)
    got = distributed(*(x.to(DEVICE) for x in tensors), plan, "triton")
    want = oracle.attention(*tensors[:3], docs.to_dense(), tensors[3])
    assert gap([x.cpu() for x in got], want) <= 1e-5


def test_one_more_rank_rounds_no_more():
    """float16: the error of four steps is that of one."""
    tensors = inputs(64, 1, 1, 32, batch=1, dtype=torch.float16)
    want = oracle.attention(*tensors[:3], ra.masks.causal(64).to_dense(), tensors[3])
    errors = []
    for world in (1, 4):
        plan = ra.make_plan(ra.masks.causal(64), ra.layouts.zigzag(64, world))
        got = distributed(*(x.to(DEVICE) for x in tensors), plan, "triton")
        errors.append([oracle.rms_error(a.cpu(), b) for a, b in zip(got, want, strict=True)])
    assert all(many <= 1.1 * one for one, many in zip(*errors, strict=True))


@pytest.mark.parametrize("heads_in_cache", [0, 1, 2])
def test_heads_that_do_not_fit_the_cache_together(monkeypatch, heads_in_cache):
    """Sections of one or two K/V heads, the last one smaller: every tile of every head once."""
    n, dim = 40, 16
    monkeypatch.setattr(call, "L2_BYTES", heads_in_cache * n * 2 * dim * 4)
    tensors = inputs(n, 6, 3, dim, batch=3)
    assert checked(ra.masks.causal(n), tensors) <= 1
    bands, out, lse = bands_of(ra.masks.causal(n)), torch.empty(3, n, 6, dim), torch.empty(3, 6, n)
    made = calls.forward("interpreter", *tensors[:3], bands, None, out, lse, Scores(1.0))
    assert made.arguments["together"] == 2 * max(1, heads_in_cache)
    # However few keys: never more than there are, so that no product of counts overflows.
    monkeypatch.setattr(call, "L2_BYTES", 2**40)
    made = calls.forward("interpreter", *tensors[:3], bands, None, out, lse, Scores(1.0))
    assert made.arguments["together"] == 18


def test_an_empty_batch_is_no_launch():
    assert [x.shape[0] for x in one_rank(*inputs(8, batch=0), [bands_of(ra.masks.causal(8))])] == [
        0
    ] * 4


def test_copies_of_a_plan_derive_their_own_lists():
    bands = Bands(bands_of(ra.masks.causal(8)))
    bands.derived["work"] = torch.ones(1)
    copy = pickle.loads(pickle.dumps(bands))
    assert copy == bands and type(copy) is Bands and copy.derived == {}


def test_same_inputs_same_bits():
    tensors = inputs(48, 2, 1, 16, batch=1)
    bands = bands_of(ra.masks.causal(48))
    first, second = (one_rank(*tensors, [bands]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_rows_without_keys_and_keys_without_rows():
    """Rows 0-19 attend nothing, keys 30-59 are attended by nobody: all exactly zero, not NaN."""
    mask = ra.masks.from_slices([ra.masks.Slice.make(Run(20, 60), Run(0, 30))], 60, 60)
    out, dq, dk, dv = one_rank(*inputs(60, 1, 1, 16, batch=1), [bands_of(mask)])
    assert all((x[:, :20] == 0).all() for x in (out, dq))
    assert all((x[:, 30:] == 0).all() for x in (dk, dv))


@pytest.mark.filterwarnings("ignore:overflow")  # of exp2, to 0 or infinity as it should
def test_log_sum_exp_gaps_stay_finite():
    q, k, v, dout = inputs(48, 1, 1, 8, batch=1)
    k[:, 30:] *= 1e4
    got = one_rank(q, k, v, dout, [bands_of(ra.masks.causal(48))])
    want = oracle.attention(q, k, v, ra.masks.causal(48).to_dense(), dout)
    assert gap(got, want) <= 1e-2


def test_any_strides():
    """Views, a last axis that is not dense, the gradient of sum(); none by descriptor."""
    mask = ra.masks.causal(40)
    q, k, v, dout = (
        x.transpose(1, 3).contiguous().transpose(1, 3)
        for x in inputs(40, 2, 1, 16, batch=1, dtype=torch.float16)
    )
    assert checked(mask, (q, k, v, torch.ones(1, dtype=q.dtype).expand_as(dout))) <= 1
    packed = torch.randn(1, 40, 4 * 16 + 3, dtype=torch.float16)
    q, k, v = (packed[..., a : a + 16].unsqueeze(2) for a in (0, 17, 35))
    assert checked(mask, (q, k, v, inputs(40, 1, 1, 16, batch=1, dtype=torch.float16)[3])) <= 1


def test_descriptors_are_for_aligned_views_only():
    x = torch.zeros(2, 40, 3, 16, dtype=torch.float16)
    assert call.aligned(x) and call.aligned(x[:, 8:]) and call.aligned(x[:1, :, :1])
    assert not call.aligned(x[..., 1:]) and not call.aligned(x.flatten()[4:-12].view(-1, 1, 1, 16))
    assert not call.aligned(x[..., :12].contiguous())
    assert not call.aligned(torch.zeros(1, dtype=torch.float16).expand(x.shape))


@pytest.mark.parametrize("step", [2**27, 2**27 + 1])
def test_offsets_past_two_to_the_31_elements(step):
    """Tokens so far apart that one tile spans more than 2^31 elements; aligned for descriptors or
    not. On a CPU the memory is never touched, so it costs nothing."""
    n, dim = 20, 8

    def far(x):
        room = torch.empty(n * step + 64, dtype=x.dtype, device=DEVICE)
        view = room.as_strided(x.shape, (n * step, step, dim, 1))
        return view.copy_(x)

    tensors = inputs(n, 1, 1, dim, batch=1, dtype=torch.float16)
    assert n * step > 2**31
    assert checked(ra.masks.causal(n), [far(x) for x in tensors]) <= 1
    q, k, v, dout = (x.to(DEVICE) for x in tensors)
    out, grads = far(q), [far(x) for x in (q.float(), k, v)]
    lse = torch.full((1, 1, n), -torch.inf, device=DEVICE)
    bands, scores = bands_of(ra.masks.causal(n)), Scores(dim**-0.5)
    triton.forward(q, k, v, bands, None, out, lse, scores)
    prepared = triton.prepare(dout, out, lse)
    triton.backward(dout, q, k, v, prepared, bands, *grads, scores, False, False)
    grads[0] *= scores.sm_scale
    asked = (*tensors[:3], ra.masks.causal(n).to_dense(), tensors[3])
    got = [x.cpu() for x in (out, *grads)]
    assert oracle.half_error(got, oracle.attention(*asked), *asked) <= LIMIT[torch.float16]


def test_no_work_is_no_launch():
    tensors = inputs(32, 1, 1, 16, batch=1)
    q, k, v, _ = (x.to(DEVICE) for x in tensors)
    far = Bands([Band.make(Run(0, 4), Run(0, 4), -4, 0)])
    state = torch.zeros(1, 32, 1, 16, device=DEVICE)
    lse = torch.full((1, 1, 32), -torch.inf, device=DEVICE)
    made = calls.forward("interpreter", q, k, v, far, state, state, lse, Scores(1.0))
    assert made.grid == 1  # one tile of 32 rows has work, and only that is launched
    new = calls.forward("interpreter", q, k, v, far, None, torch.empty_like(q), lse, Scores(1.0))
    assert new.grid == -(-32 // new.arguments["M"])


# --- what the tests above would see ---


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "damage",
    [
        lambda v: v.__setitem__((slice(None), 7), v[:, 7] - 1),  # the band one narrower
        lambda v: v.__setitem__((slice(None), 11), v[:, 11] + (v[:, 11] < v[:, 9])),  # masked: full
        lambda v: v.__setitem__((slice(None), 9), v[:, 9] - 1),  # the last tile not visited
        lambda v: v.__setitem__((slice(None), 8), v[:, 8] + 1),  # tiles one column to the right
    ],
)
def test_mutant_work_lists(monkeypatch, damage):
    def damaged(*arguments):
        made = work(*arguments)
        damage(made.visits)
        return made

    monkeypatch.setattr(calls, "work", damaged)
    assert not checked(ra.masks.causal(80), inputs(80, 1, 1, 16, batch=1)) <= 30


def test_mutant_step_before_forgotten(monkeypatch):
    def fresh(*arguments):
        made = make(*arguments)
        made.arguments["ADD"] = False
        return made

    make = calls.forward
    monkeypatch.setattr(calls, "forward", fresh)
    steps = [
        [Band.make(Run(0, 40), Run(0, 20), -40, 0)],
        [Band.make(Run(20, 40), Run(20, 40), -40, 0)],
    ]
    assert not checked(ra.masks.causal(40), inputs(40, 1, 1, 16, batch=1), steps) <= 30


def test_kernels_are_interpreted_here():
    """Or these tests would not have run what they claim."""
    assert (DEVICE == "cuda") != triton.INTERPRETED and fwd.forward is not None


# --- refusals ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "bfloat16, float16 and float32.*reference"),
        ({"dim": 300}, "up to head_dim 256.*aten"),
    ],
)
def test_what_is_not_supported_says_what_to_do(change, message):
    tensors = [x.to(DEVICE) for x in inputs(8, **change)]
    plan = ra.make_plan(ra.masks.causal(8), ra.layouts.zigzag(8, 1))
    with pytest.raises(ValueError, match=message):
        ra.ring_attention(*tensors[:3], plan, kernel="triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's own limits")
def test_the_interpreter_refuses_bfloat16_and_a_cpu_is_no_gpu(monkeypatch):
    plan = ra.make_plan(ra.masks.causal(8), ra.layouts.zigzag(8, 1))
    q, k, v, _ = inputs(8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="garbage in bfloat16"):
        ra.ring_attention(q, k, v, plan, kernel="triton")
    monkeypatch.setattr(triton, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"runs on a GPU.*TRITON_INTERPRET=1"):
        ra.ring_attention(q, k, v, plan, kernel="triton")
