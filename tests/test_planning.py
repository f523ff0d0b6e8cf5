"""Masks, layouts and plans against dense NumPy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ringattn as ra
from ringattn.layouts import Layout
from ringattn.masks import Slice
from ringattn.runs import Run, floor_sum

from .cases import layouts, masks

runs = st.builds(Run, st.integers(-5, 25), st.integers(-5, 40), st.integers(1, 6))


@given(runs, runs)
def test_run_algebra(a, b):
    left, right = set(a.to_array().tolist()), set(b.to_array().tolist())
    assert set((a & b).to_array().tolist()) == left & right
    parts = [x for part in a - b for x in part.to_array().tolist()]
    assert sorted(parts) == sorted(left - right)


@given(st.integers(0, 30), st.integers(1, 9), st.integers(-9, 9), st.integers(-40, 40))
def test_floor_sum(count, divisor, slope, offset):
    assert floor_sum(count, divisor, slope, offset) == sum(
        (slope * i + offset) // divisor for i in range(count)
    )


@st.composite
def slices(draw, n=24):
    run = st.builds(Run, st.integers(0, n), st.integers(0, n), st.integers(1, 5))
    return Slice.make(draw(run), draw(run), draw(st.integers(-n, n)), draw(st.integers(-n, n)))


@given(st.lists(slices(), max_size=4), st.lists(slices(), max_size=4))
def test_mask_algebra(first, second):
    a, b = ra.masks.from_slices(first, 24, 24), ra.masks.from_slices(second, 24, 24)
    x, y = a.to_dense(), b.to_dense()
    for mask, dense in [(a & b, x & y), (a | b, x | y), (a - b, x & ~y)]:
        assert (mask.to_dense() == dense).all()
        assert mask.area == dense.sum()  # also proves the slices disjoint


@given(slices())
def test_unit_step_covers_the_slice_once(part):
    dense = np.zeros((24, 24), int)
    for q, k, lo, hi in part.unit_step():
        for i, row in enumerate(q.to_array()):
            for j, col in enumerate(k.to_array()):
                dense[row, col] += lo <= j - i <= hi
    assert (dense == ra.masks.from_slices([part], 24, 24).to_dense()).all()


def test_builders_match_their_definitions():
    n = 17
    q, k = np.arange(n)[:, None], np.arange(n)[None, :]
    doc = np.repeat([0, 1, 3], [4, 6, 7])
    same = doc[:, None] == doc[None, :]
    expected = [
        (ra.masks.causal(n), k <= q),
        (ra.masks.full(n), q == q + 0 * k),
        (ra.masks.sliding_window(n, 5), (k <= q) & (q - k < 5)),
        (ra.masks.sliding_window(n, 5, causal=False), abs(q - k) < 5),
        (ra.masks.documents([4, 6, 0, 7]), same & (k <= q)),
        (ra.masks.documents([4, 6, 7], causal=False), same),
        (ra.masks.prefix_lm(n, 6), (k <= q) | ((q < 6) & (k < 6))),
        (ra.masks.sinks(n, 3), (k <= q) & (k < 3)),
    ]
    for mask, dense in expected:
        assert (mask.to_dense() == dense).all()
        assert mask.area == dense.sum()
    assert ra.masks.full(3, 5).to_dense().shape == (3, 5)


def test_slices_may_be_written_as_tuples():
    written = ra.masks.from_slices([((0, 9), (0, 9, 2), None, 0), ((2, 4), (5, 9), -9, 9)], 9, 9)
    q, k = np.arange(9)[:, None], np.arange(9)[None, :]
    block = (q >= 2) & (q < 4) & (k >= 5)
    assert (written.to_dense() == (((k <= q) & (k % 2 == 0)) | block)).all()


def test_area_needs_no_dense_mask():
    n = 2**24
    assert ra.masks.causal(n).area == n * (n + 1) // 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ra.masks.causal(-1), "n must be"),
        (lambda: ra.masks.sliding_window(4, 0), "window must be"),
        (lambda: ra.masks.prefix_lm(4, 5), "prefix must be at most"),
        (lambda: ra.masks.causal(4) & ra.masks.causal(5), "different size"),
        (lambda: ra.layouts.zigzag(4, 0), "world >= 1"),
        (lambda: ra.masks.from_slices([Slice.make(Run(0, 9), Run(0, 9))], 8, 8), "outside"),
        (lambda: ra.masks.from_slices([(0, 4, 0, 0)], 4, 4), "a slice is"),
        (lambda: Layout(4, ((Run(0, 3),), (Run(2, 4),))), "exactly once"),
        (lambda: Layout(4, ((Run(0, 2),), (Run(3, 4),))), "exactly once"),
        (lambda: Layout(4, ((Run(0, 2),), (Run(2, 5),))), "exactly once"),
        (lambda: Layout(6, ((Run(0, 6, 2),), (Run(1, 6, 3),))), "one step"),
        (lambda: ra.make_plan(ra.masks.causal(4), ra.layouts.zigzag(5, 2)), "layout has 5"),
        (lambda: ra.make_plan(ra.masks.causal(4), ra.layouts.zigzag(4, 2), "spiral"), "ring"),
        (lambda: ra.make_plan(ra.masks.causal(4), ra.layouts.zigzag(4, 2), ulysses=2), "ulysses=2"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@given(st.integers(0, 50), st.integers(1, 9), st.sampled_from(list(ra.layouts.BUILDERS)))
def test_layouts_partition_and_round_trip(n, world, name):
    layout = ra.layouts.BUILDERS[name](n, world)
    x = np.arange(n * 3).reshape(1, n, 3)
    parts = [layout.shard(x, rank) for rank in range(world)]
    assert (layout.unshard(parts) == x).all()
    counts = [layout.count(rank) for rank in range(world)]
    assert max(counts) - min(counts) <= 2 and sum(counts) == n
    for rank in range(world):
        assert (np.diff(layout.positions(rank)) > 0).all()


@settings(max_examples=60)
@given(st.data())
def test_plan_computes_every_pair_once_and_every_receive_has_its_send(data):
    mask = data.draw(masks(max_n=40))
    layout = data.draw(layouts(mask.n_q, max_world=9))
    plan = ra.make_plan(mask, layout)
    dense = np.zeros((mask.n_q, mask.n_k), int)
    for rank in range(layout.world):
        steps = plan.steps(rank)
        assert plan.area(rank) == sum(part.area for step in steps for part in step.slices)
        for step in steps:
            own, keys = layout.positions(rank), layout.positions(step.owner)
            shape = (len(own), len(keys))
            local = ra.masks.from_slices(step.slices, *shape)
            assert sum(part.area for part in step.slices) == local.area
            dense[np.ix_(own, keys)] += local.to_dense()
    assert (dense == mask.to_dense()).all()
    assert sum(plan.area(rank) for rank in range(layout.world)) == mask.area

    for kind in ("", "grad_"):
        sent, received = [], []
        for rank in range(layout.world):
            for at, step in enumerate(plan.steps(rank)):
                sent += [
                    (at, rank, m.peer, m.tokens, m.home) for m in getattr(step, kind + "sends")
                ]
                received += [
                    (at, m.peer, rank, m.tokens, m.home) for m in getattr(step, kind + "recvs")
                ]
        assert sorted(sent) == sorted(received)


@settings(max_examples=60)
@given(st.data())
def test_a_block_stops_at_the_last_rank_that_attends_it(data):
    mask = data.draw(masks(max_n=40))
    layout = data.draw(layouts(mask.n_q, max_world=9))
    plan, dense, world = ra.make_plan(mask, layout), mask.to_dense(), layout.world
    for owner in range(world):
        keys = layout.positions(owner)
        attend = [
            hop
            for hop in range(1, world)
            if dense[np.ix_(layout.positions((owner + hop) % world), keys)].any()
        ]
        assert plan.reach[owner] == max(attend, default=0)


def test_planning_at_1024_ranks_touches_few_blocks():
    n, world = 2**20, 1024
    docs = ra.masks.documents([15_000] * 69 + [n - 69 * 15_000])
    plan = ra.make_plan(docs, ra.layouts.contiguous(n, world))
    assert 10 < len(plan.steps(500)) < 17  # a document lies on 15 or 16 ranks
    assert len(plan._blocks) < 4 * world


def test_blocks_that_nobody_needs_are_not_sent():
    n, world = 64, 8
    window = ra.make_plan(ra.masks.sliding_window(n, 8), ra.layouts.contiguous(n, world))
    assert [window.recv_tokens(rank) for rank in range(world)] == [0] + [8] * 7
    whole = ra.make_plan(ra.masks.causal(n), ra.layouts.zigzag(n, world))
    assert whole.recv_tokens(0) == n - n // world
    assert whole.imbalance < 1.001


def test_many_documents_and_long_runs_are_quick_to_combine():
    """The number of slices compared, not the time: sweeps and residues, no quadratic loops."""
    calls = 0

    class Counting(Slice):
        def __and__(self, other):
            nonlocal calls
            calls += 1
            return super().__and__(other)

    many = ra.masks.documents([64] * 1000)
    counted = tuple(Counting(s.q, s.k, s.lo, s.hi) for s in many.slices)
    counted = ra.masks.Mask(counted, many.n_q, many.n_k)
    window = ra.masks.sliding_window(64_000, 10)
    assert (counted & window).area + (counted - window).area == many.area
    assert (counted & many).area == many.area
    assert calls < 10_000
    # Even queries never meet odd keys at distance 0, and it takes no walk to know.
    assert not Slice.make(Run(0, 2**40, 2), Run(1, 2**40, 2), 0, 0)
