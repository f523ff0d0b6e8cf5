"""The Gluon kernels in the emulator, against the float64 oracle: masks, heads, steps, ranks; and
with faults put in, each of which must show."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ringattn.kernels import Scores, call, gluon, triton
from ringattn.kernels.gluon import calls
from ringattn.kernels.launch import gluon_line
from ringattn.kernels.work import FIRST, FULL_FROM, FULL_TO, TILES, chain, work

import ringattn as ra

from . import oracle
from .cases import masks
from .gluon_emulator import Emulator, Race
from .test_attention import distributed, inputs
from .test_triton import bands_of, covered

# Of oracle.half_error: three roundings.
LIMIT = {torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}
EMULATOR = Emulator()


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """Calls of Gluon kernels go to an emulator, in a random order; the others as they were. What
    is returned holds the emulator, how many programs are resident, and the calls that it ran."""
    state = {"emulator": EMULATOR, "random": random.Random(0), "resident": None, "ran": []}
    start = call.start

    def either(kernel, grid, arguments, options):
        if kernel not in (calls.fwd.forward, calls.bwd.backward):
            return start(kernel, grid, arguments, options)
        draw = state["random"]
        resident = state["resident"] or draw.choice([1, 2, 5])
        state["ran"].append(kernel.fn.__name__)
        return state["emulator"].run(kernel, grid, arguments, draw.getrandbits(30), resident)

    monkeypatch.setattr(call, "start", either)
    monkeypatch.setattr(gluon, "architecture", lambda device: "emulator")
    monkeypatch.setattr(gluon, "refusal", lambda *_: None)
    monkeypatch.setattr(calls, "_multiprocessors", lambda device: 3)
    return state


def one_rank(q, k, v, dout, steps, softcap=0.0):
    """[out, dq, dk, dv] of one rank that is given the bands in several steps, dq not rounded; bf16
    is prepared in float32, as Triton's interpreter cannot."""
    scores = Scores(q.shape[-1] ** -0.5, softcap)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf)
    partial = None
    for index, bands in enumerate(steps):
        last = index == len(steps) - 1
        if last or partial is None:  # poisoned: what is not written shows
            out = torch.full_like(dout, torch.nan, dtype=q.dtype if last else torch.float32)
        gluon.forward(q, k, v, bands, partial, out, lse, scores)
        partial = out
    prepared = gluon.prepare(dout.float(), out.float(), lse)
    dtype = q.dtype if len(steps) == 1 else torch.float32
    dq = torch.full(q.shape, torch.nan)
    dk, dv = (torch.full_like(x, torch.nan, dtype=dtype) for x in (k, v))
    for index, bands in enumerate(steps):
        ends = (scores, index > 0, index > 0)
        gluon.backward(dout, q, k, v, prepared, bands, dq, dk, dv, *ends)
    return [out, gluon.finish(dq, torch.float32, scores), dk, dv]


def checked(mask, tensors, steps=None, softcap=0.0):
    """The error against float64, over its limit."""
    got = one_rank(*tensors, steps or [bands_of(mask)], softcap=softcap)
    asked = (*tensors[:3], mask.to_dense(), tensors[3], None, softcap)
    return oracle.half_error(got, oracle.attention(*asked), *asked) / LIMIT[tensors[0].dtype]


# --- work lists ---


@settings(max_examples=120, deadline=None)
@given(masks(max_n=60), st.sampled_from([(8, 4), (16, 16), (4, 8)]), st.booleans())
def test_chains_take_every_tile_of_queries_in_turn(mask, size, everything):
    """All pairs once; and of the visits that add to a tile of queries each follows the one before
    it in the list, which is the only one that it waits for."""
    n, m = size
    bands = bands_of(mask)
    if not bands or any(b.q.step > 1 or b.k.step > 1 for b in bands):
        return
    made = work(bands, mask.n_k, n, m, True, everything, aligned=True)
    chained = chain(made, mask.n_q, m)
    last, places = {}, []
    for place, (_, begin, end) in enumerate(chained.tiles):
        places += [place] * (end - begin)
        for number in range(begin, end):
            visit = chained.visits[number]
            start = int(visit[3] + visit[FIRST])
            assert start % m == 0 and start >= 0
            assert 0 <= visit[FULL_FROM] <= visit[FULL_TO] <= visit[TILES]
            for tile in range(start // m, start // m + visit[TILES]):
                awaited, own = chained.turns[number].tolist()
                assert awaited == last.get(tile, 0) < own
                last[tile] = own
    assert len(places) == len(chained.visits)
    count, _ = covered(bands, mask.n_k, mask.n_q, n, m, True, everything)
    assert (count == mask.to_dense().T).all()


def test_few_cuts_and_nobody_waits_long():
    """Windows and causal masks: every tile of keys comes to a tile of queries after the one before
    has, if all start at once and walk at one pace."""
    for mask in (ra.masks.causal(2048), ra.masks.sliding_window(2048, 512), ra.masks.full(2048)):
        made = work(bands_of(mask), 2048, 128, 64, True, False, aligned=True)
        chained, came = chain(made, 2048, 64), {}
        assert len(chained.visits) <= 2 * len(made.visits)
        for place, (_, begin, end) in enumerate(chained.tiles):
            time = 0
            for visit in chained.visits[begin:end]:
                start = int(visit[3] + visit[FIRST]) // 64
                for tile in reversed(range(start, start + visit[TILES])):
                    assert came.get(tile, (-1, -1)) <= (time, place)
                    came[tile] = (time, place)
                    time += 1


# --- the kernels ---


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_masks_heads_and_steps(data):
    """Any mask, grouped heads, odd lengths and head_dims; the bands dealt over up to 3 steps."""
    mask = data.draw(masks(max_n=70))
    bands = bands_of(mask)
    if not bands:
        return
    kv_heads, group = data.draw(st.sampled_from([(1, 1), (1, 2), (2, 1)]))
    dim, dim_v = data.draw(st.tuples(*[st.sampled_from([8, 64, 80, 96])] * 2))
    dtype = data.draw(st.sampled_from([torch.float16]))
    parts = data.draw(st.integers(1, 3))
    steps = [part for part in (bands[i::parts] for i in range(parts)) if part]
    batch = data.draw(st.integers(1, 2))
    tensors = inputs(mask.n_q, kv_heads * group, kv_heads, dim, dim_v, batch, dtype, n_k=mask.n_k)
    assert checked(mask, tensors, steps) <= 1


FAMILIES = {
    "full": ra.masks.full(80),
    "causal": ra.masks.causal(80),
    "window": ra.masks.sliding_window(80, 21),
    "window and sinks": ra.masks.sliding_window(80, 21) | ra.masks.sinks(80, 3),
    "documents": ra.masks.documents([37, 4, 1, 38]),
    "prefix": ra.masks.prefix_lm(80, 30),
    "rows without keys": ra.masks.causal(80)
    - ra.masks.from_slices(ra.masks.full(20, 80).slices, 80, 80),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_masks_in_bf16(name, softcap, emulated):
    tensors = inputs(80, 4, 2, 64, batch=2, dtype=torch.bfloat16)
    assert checked(FAMILIES[name], tensors, softcap=softcap) <= 1
    assert emulated["ran"] == ["forward", "backward"]


@pytest.mark.parametrize("dims", [(96, 96), (128, 128), (192, 128), (256, 256), (80, 40)])
def test_head_dims(dims):
    steps = [bands_of(FAMILIES["causal"] & part) for part in cut(80, 30)]
    assert checked(FAMILIES["causal"], inputs(80, 2, 1, *dims, 1, torch.float16), steps) <= 1


def cut(n, at):
    """Two masks: the keys below ``at`` and the others."""
    whole = ra.masks.full(n).slices[0]
    sides = (
        ra.masks.Slice.make(whole.q, run) for run in (whole.k.clip(0, at), whole.k.clip(at, n))
    )
    return [ra.masks.from_slices([side], n, n) for side in sides]


@pytest.mark.parametrize("schedule", ["ring", "direct"])
def test_virtual_ranks_with_sinks(schedule, emulated):
    """The executor drives them; a sink is where the log-sum-exp begins."""
    docs = ra.masks.documents([19, 40, 31])
    plan = ra.make_plan(docs, ra.layouts.zigzag(90, 3), schedule)
    tensors = inputs(90, 2, 1, 64, batch=1, dtype=torch.float16)
    got = distributed(*tensors, plan, "gluon")
    want = oracle.attention(*tensors[:3], docs.to_dense(), tensors[3])
    assert max(oracle.error(a, b) for a, b in zip(got, want, strict=True)) <= 2e-3
    assert "backward" in emulated["ran"]


def test_a_sink_is_where_the_log_sum_exp_begins():
    tensors, mask = inputs(40, 2, 1, 64, batch=1, dtype=torch.float16), ra.masks.causal(40)
    sinks = torch.tensor([0.5, -1.0], dtype=torch.float16)
    plan = ra.make_plan(mask, ra.layouts.contiguous(40, 1))
    out = ra.ring_attention(*tensors[:3], plan, kernel="gluon", sinks=sinks)
    want = oracle.attention(*tensors[:3], mask.to_dense(), tensors[3], sinks=sinks)[0]
    assert oracle.error(out, want) <= 2e-3


def test_same_bits_in_any_order(emulated):
    """However many programs are resident, and in whatever order they start."""
    tensors = inputs(80, 4, 2, 64, batch=1, dtype=torch.float16)
    bands = bands_of(FAMILIES["causal"])
    runs = []
    for seed, resident in enumerate((1, 2, 12, 12)):
        emulated["random"], emulated["resident"] = random.Random(seed), resident
        runs.append(one_rank(*tensors, [bands]))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_rows_without_keys_and_keys_without_rows():
    mask = ra.masks.from_slices(
        [ra.masks.Slice.make(ra.masks.Run(20, 60), ra.masks.Run(0, 30))], 60, 60
    )
    out, dq, dk, dv = one_rank(
        *inputs(60, 1, 1, 64, batch=1, dtype=torch.float16), [bands_of(mask)]
    )
    assert all((x[:, :20] == 0).all() for x in (out, dq))
    assert all((x[:, 30:] == 0).all() for x in (dk, dv))


def test_stages_writers_and_small_caches(monkeypatch):
    """Other lines, and heads that do not run side by side."""
    monkeypatch.setattr(call, "L2_BYTES", 1)
    monkeypatch.setattr(calls, "HEADS_TOGETHER", 1)
    monkeypatch.setattr(
        gluon,
        "gluon_line",
        lambda *given: replace(gluon_line(*given), stages=3, writers=1),
    )
    assert checked(FAMILIES["causal"], inputs(80, 4, 2, 64, batch=2, dtype=torch.float16)) <= 1


# --- what goes to the Triton kernels, and what is refused ---


def test_what_gluon_does_not_cover_goes_to_triton(emulated):
    """Masks that step, and views that the copy engine cannot read."""
    mask = ra.masks.dilated(40, 10, 3)
    tensors = inputs(40, 2, 1, 64, batch=1, dtype=torch.float16)
    assert checked(mask, tensors) <= 1
    odd = [torch.empty(1, 40, x.shape[2], 65, dtype=x.dtype)[..., 1:].copy_(x) for x in tensors]
    assert checked(ra.masks.causal(40), odd) <= 1
    assert emulated["ran"] == []


def test_a_partial_may_have_other_strides_than_the_output(emulated):
    q, k, v, dout = inputs(40, 2, 1, 64, batch=2, dtype=torch.float16)
    near, causal = ra.masks.sliding_window(40, 9), ra.masks.causal(40)
    want = oracle.attention(q, k, v, causal.to_dense(), dout)[0]
    lse = torch.full((2, 2, 40), -torch.inf)
    partial, out = torch.empty(2, 40, 2, 64), torch.empty_like(q)
    gluon.forward(q, k, v, bands_of(near), None, partial, lse, Scores(0.125))
    wide = torch.full((2, 40, 2, 80), torch.nan)[..., :64].copy_(partial)
    gluon.forward(q, k, v, bands_of(causal - near), wide, out, lse, Scores(0.125))
    assert oracle.error(out, want) <= LIMIT[torch.float16]
    assert emulated["ran"] == ["forward"]  # then Triton's


def test_refusals_say_what_to_do(monkeypatch):
    monkeypatch.undo()
    cuda = torch.device("cuda:0")
    assert "bfloat16 and float16, not float32" in gluon.refusal(torch.float32, cuda, 64, 64)
    assert "runs on a GPU" in gluon.refusal(torch.float16, torch.device("cpu"), 64, 64)
    monkeypatch.setattr(gluon, "capability", lambda device: (8, 0))
    assert "written for Hopper" in gluon.refusal(torch.float16, cuda, 64, 64)
    monkeypatch.setattr(gluon, "capability", lambda device: (9, 0))
    monkeypatch.setattr(gluon, "architecture", lambda device: "sm_90")
    assert "no line for head_dim 300" in gluon.refusal(torch.float16, cuda, 300, 64)
    monkeypatch.setattr(gluon, "MISSING", ["async_load"])
    gluon._problem.cache_clear()
    with pytest.warns(
        UserWarning, match="newer Triton, whose Gluon has async_load.*Triton kernels"
    ):
        assert "use kernel='triton'" in gluon.refusal(torch.float16, cuda, 64, 64)
    monkeypatch.setattr(gluon, "MISSING", [])
    monkeypatch.setattr(gluon.check, "disagreement", lambda *_: "differ in dq by 3.0e-01")
    gluon._problem.cache_clear()
    with pytest.warns(UserWarning, match="does not work here.*differ in dq"):
        assert gluon.refusal(torch.float16, cuda, 64, 64)
    gluon._problem.cache_clear()
    assert not gluon.check.missing()


def test_the_self_check_compares_with_triton(monkeypatch, emulated):
    """It agrees in the emulator; and sees a kernel that is wrong, or does not run."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(triton, "architecture", lambda device: "interpreter")
    monkeypatch.setattr(
        gluon.check, "gluon_line", lambda arch, *rest: gluon_line("emulator", *rest)
    )
    monkeypatch.setattr(gluon.check, "TOKENS", 61)
    check = gluon.check.disagreement.__wrapped__
    assert check(cpu, torch.float16, 64, 64) is None
    monkeypatch.setitem(
        emulated, "emulator", Emulator(("bwd", "b_dk * sm_scale", "b_dk * sm_scale * 1.1"))
    )
    assert "differ from the Triton kernels in dk" in check(cpu, torch.float16, 64, 64)
    monkeypatch.setitem(emulated, "emulator", None)
    assert "failed with AttributeError" in check(cpu, torch.float16, 64, 64)


# --- faults, each of which must show ---

FAULTS = {
    "K released before its product is waited for": (
        "fwd",
        "        b_s = warpgroup_mma_wait(1, deps=(b_s,))\n"
        "        mbarrier.arrive(k_free.index(j % STAGES), count=1)\n",
        "        mbarrier.arrive(k_free.index(j % STAGES), count=1)\n"
        "        b_s = warpgroup_mma_wait(1, deps=(b_s,))\n",
    ),
    "V released before its product is waited for": (
        "fwd",
        "        acc = warpgroup_mma_wait(0, deps=(acc,))\n"
        "        mbarrier.arrive(v_free.index(before % STAGES), count=1)\n",
        "        mbarrier.arrive(v_free.index(before % STAGES), count=1)\n"
        "        acc = warpgroup_mma_wait(0, deps=(acc,))\n",
    ),
    "the wait for P V leaves one in flight": (
        "fwd",
        "        acc = warpgroup_mma_wait(0, deps=(acc,))\n"
        "        mbarrier.arrive(v_free.index(before % STAGES), count=1)\n",
        "        acc = warpgroup_mma_wait(1, deps=(acc,))\n"
        "        mbarrier.arrive(v_free.index(before % STAGES), count=1)\n",
    ),
    "wrong phase: the producer does not wait for K's buffer": (
        "fwd",
        "mbarrier.wait(k_free.index(slot), n // STAGES & 1 ^ 1)",
        "mbarrier.wait(k_free.index(slot), n // STAGES & 1)",
    ),
    "wrong phase: the consumer waits for the V before": (
        "fwd",
        "mbarrier.wait(v_ready.index(before % STAGES), before // STAGES & 1)",
        "mbarrier.wait(v_ready.index(before % STAGES), before // STAGES & 1 ^ 1)",
    ),
    "Q released before the last product with it": (
        "fwd",
        "        mbarrier.arrive(k_free.index(n % STAGES), count=1)\n        b_p_new,",
        "        mbarrier.arrive(k_free.index(n % STAGES), count=1)\n"
        "        mbarrier.arrive(q_free.index(WG), count=1)\n        b_p_new,",
    ),
    "the producer runs past the last K tile": (
        "fwd",
        "        mbarrier.wait(k_free.index(n % STAGES), n // STAGES & 1 ^ 1)\n"
        "        mbarrier.arrive",
        "        mbarrier.arrive",
    ),
    "dropped rescale": (
        "fwd",
        "acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]",
        "acc = acc * 1",
    ),
    "masked tiles taken for full": (
        "fwd",
        "WG, CHUNKS, STAGES, True, CAPPED,",
        "WG, CHUNKS, STAGES, False, CAPPED,",
    ),
    "Q and dO released before the product for dk is waited for": (
        "bwd",
        "        b_dk = warpgroup_mma_wait(0, deps=(b_dk,))\n"
        "        mbarrier.arrive(free.index(slot), count=1)",
        "        mbarrier.arrive(free.index(slot), count=1)\n"
        "        b_dk = warpgroup_mma_wait(0, deps=(b_dk,))",
    ),
    "the wait for dP leaves one in flight": (
        "bwd",
        "b_dp = warpgroup_mma_wait(0, deps=(b_dp,))",
        "b_dp = warpgroup_mma_wait(1, deps=(b_dp,))",
    ),
    "no fence between dS and the product that reads it": (
        "bwd",
        "        dss.store(b_ds)\n        fence_async_shared()\n",
        "        dss.store(b_ds)\n",
    ),
    "no fence between dq and its reduction": (
        "bwd",
        "while the product for dk runs\n        fence_async_shared()\n",
        "while the product for dk runs\n",
    ),
    "wrong phase: a writer takes dq before it is there": (
        "bwd",
        "mbarrier.wait(dq_ready.index(WHICH), (n + i) // WRITERS & 1)",
        "mbarrier.wait(dq_ready.index(WHICH), (n + i) // WRITERS & 1 ^ 1)",
    ),
    "dq's buffer given back before it has been read": (
        "bwd",
        "                tma.store_wait(0)  # the buffer has been read\n",
        "",
    ),
    "no semaphore": (
        "bwd",
        '                gl.atomic_poll(own + at // M, awaited, sem="acquire")\n',
        "",
    ),
    "the semaphore moves on before the sums are in memory": (
        "bwd",
        "                tma.store_wait(0, read_only=False)  # the sums are in memory\n"
        '                gl.atomic_xchg(own + at // M, number_own, sem="release")\n',
        '                gl.atomic_xchg(own + at // M, number_own, sem="release")\n'
        "                tma.store_wait(0, read_only=False)\n",
    ),
    "places taken by the number of the program": (
        "bwd",
        'index = gl.atomic_add(counters, 1, sem="relaxed")',
        "index = gl.program_id(0)",
    ),
    "a stale descriptor: dO in place of Q": (
        "bwd",
        "tma.async_load(q_desc, [b, at, head, 0], q_ready.index(slot), qs.index(slot))",
        "tma.async_load(do_desc, [b, at, head, 0], q_ready.index(slot), qs.index(slot))",
    ),
    "masked items taken for full": (
        "bwd",
        "STAGES, WRITERS, True, CAPPED, S,",
        "STAGES, WRITERS, False, CAPPED, S,",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught(name, emulated, monkeypatch):
    """In one of a few orders: as a race, a deadlock, a wrong number, or other bits. The forward
    with three buffers and short documents, so that the producer runs far ahead."""
    emulated["emulator"] = Emulator(FAULTS[name])
    tensors = inputs(80, 4, 2, 64, batch=1, dtype=torch.float16)
    mask = FAMILIES["causal"]
    if FAULTS[name][0] == "fwd":
        mask = ra.masks.documents([20, 60])
        monkeypatch.setattr(gluon, "gluon_line", lambda *x: replace(gluon_line(*x), stages=3))
    want = oracle.attention(*tensors[:3], mask.to_dense(), tensors[3])
    first = None
    for seed in range(12):
        emulated["random"], emulated["resident"] = random.Random(seed), [2, 12][seed % 2]
        try:
            got = one_rank(*tensors, [bands_of(mask)])
        except (Race, TypeError, AttributeError):
            return
        if not max(oracle.error(a, b) for a, b in zip(got, want, strict=True)) <= 2e-3:
            return
        first = first or got
        if not all(torch.equal(a, b) for a, b in zip(first, got, strict=True)):
            return
    pytest.fail("not seen in 12 orders")
