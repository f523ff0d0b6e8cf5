"""Mixers with chosen or summarised keys, over split sequences, beside their dense definitions."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from torch.utils.checkpoint import checkpoint

import ringattn as ra
from ringattn import mixers
from ringattn.cli.pictures import draw_mask, draw_work
from ringattn.execution.carriers import Counted, VirtualWorld
from ringattn.mixers import naive_attention
from ringattn.mixers.routed import chosen_part, moba_choice
from ringattn.planning import prove
from ringattn.planning.blocks import Blocks
from ringattn.planning.routing import expected

from . import oracle
from .families import (
    DIM,
    FAMILIES,
    KV_HEADS,
    blocks_of,
    inputs_of,
    split,
    whole,
)  # fmt: skip
from .processes import ROOT, launch

LAYOUTS = ("contiguous", "zigzag", "balanced")


def both(name, layout, lengths, seed=0, ulysses=1, dtype=torch.float64, change=None,
         wrap=lambda f: f):  # fmt: skip
    """Relative errors of the output and of every gradient, by name; and the outputs by rank."""
    family = FAMILIES[name]
    inputs, d_out = inputs_of(family, layout.n, seed)
    if change is not None:
        change(inputs)
    if dtype == torch.float32:  # what is given is exact, so choices are the same
        inputs = {k: x.float().double() if x.is_floating_point() else x for k, x in inputs.items()}
    want, grads = whole(family, inputs, d_out, lengths)
    blocks = blocks_of(family, layout, lengths, ulysses)
    found = VirtualWorld(layout.world, 120).run(
        lambda rank: wrap(lambda: split(family, inputs, d_out, blocks, rank.rank, rank, dtype))()
    )
    errors = {"out": _apart(layout.unshard([out for out, _ in found]), want)}
    for key, wanted in grads.items():
        parts = [own[key] for _, own in found]
        got = sum(parts) if key in family.shared else layout.unshard(parts)
        errors[f"d_{key}"] = _apart(got, torch.zeros_like(got) if wanted is None else wanted)
    return errors, [out for out, _ in found]


def _apart(got, want):
    return float((got.double() - want).norm() / (want.norm() + 1))


@st.composite
def cases(draw):
    """(layout, lengths, ulysses) of any documents on any ranks, of which some may own nothing."""
    world = draw(st.sampled_from([1, 2, 3, 4, 6]))
    n = draw(st.integers(max(1, world // 2), 40))
    lengths, left = [], n
    while left:
        lengths.append(draw(st.integers(1, left)))
        left -= lengths[-1]
    mask = ra.masks.documents(lengths)
    layout = ra.layouts.build(draw(st.sampled_from(LAYOUTS)), mask, world)
    degrees = [u for u in (1, 2, 4) if world % u == 0]
    return layout, lengths, draw(st.sampled_from(degrees))


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=12)
@given(case=cases(), seed=st.integers(0, 2**31))
def test_any_split_is_the_definition(name, case, seed):
    """Odd lengths, packed documents, blocks that straddle, heads split over ranks."""
    layout, lengths, ulysses = case
    if not FAMILIES[name].ulysses or (name == "nsa" and KV_HEADS % ulysses):
        ulysses = 1
    errors, _ = both(name, layout, lengths, seed, ulysses)
    # Linear attention is float32 inside, whatever it is given.
    assert max(errors.values()) < (3e-5 if name == "scatterbrain" else 1e-11), errors


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("world", "kind"), [(1, "contiguous"), (4, "zigzag"), (16, "balanced")])
def test_in_float32_and_on_sixteen_ranks(name, world, kind):
    lengths = [29, 3, 1, 50]
    layout = ra.layouts.build(kind, ra.masks.documents(lengths), world)
    errors, _ = both(name, layout, lengths, 3, dtype=torch.float32)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("name", FAMILIES)
def test_runs_repeat_bitwise(name):
    layout, lengths = ra.layouts.zigzag(61, 3), [20, 30, 11]
    first, outs = both(name, layout, lengths, dtype=torch.float32)
    again, others = both(name, layout, lengths, dtype=torch.float32)
    assert first == again and all(map(torch.equal, outs, others))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_on_real_processes(world):
    status, output = launch(world, ROOT / "tests/workers/families.py")
    assert status == 0 and output.count("off by") == world, output


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.causal])
@pytest.mark.parametrize("at", [0, 5, 6, 11, 12, 23, 24, 25, 29, 30, 35])
def test_nothing_of_the_future_leaks(name, at):
    """A token is changed: nothing before it moves, and nothing of other documents; at the borders
    of blocks (multiples of 3, 6 and 12) and of the document at 24 in particular."""
    family, lengths = FAMILIES[name], [24, 12]
    layout = ra.layouts.zigzag(36, 3)
    inputs, _ = inputs_of(family, 36, 5)
    blocks = blocks_of(family, layout, lengths)
    # Of buckets and choices that follow the token: they may not matter to those before it either.
    outs = []
    for change in (0.0, 3.0):
        now = {k: x.clone() for k, x in inputs.items()}
        for key, x in now.items():
            if key not in family.shared and x.is_floating_point():
                x[:, at] += change
        part = {k: x for k, x in now.items() if k in family.shared}

        def work(rank, now=now, part=part):
            own = {k: x if k in part else layout.shard(x, rank.rank) for k, x in now.items()}
            return family.split(own, blocks, rank)

        outs.append(layout.unshard(VirtualWorld(3, 60).run(work)))
    moved = (outs[0] - outs[1]).abs().amax((0, 2, 3)) > (1e-6 if name == "scatterbrain" else 1e-12)
    end = 24 if at < 24 else 36
    assert not moved[:at].any() and not moved[end:].any(), moved.nonzero().flatten()
    assert moved[at] or name == "selected"  # which here may choose no token at all


def test_hashed_tokens_are_ordered_without_the_future():
    """A later token of a bucket shifts the chunks of the order, by which earlier ones would be cut
    differently: it must come after them."""
    n = 24
    q, k, v = (torch.randn(1, n, 1, 4, dtype=torch.float64) for _ in range(3))
    buckets = (torch.arange(n) % 2)[None, :, None, None].clone()
    layout = ra.layouts.contiguous(n, 2)
    blocks = ra.make_blocks(ra.masks.causal(n), layout, 4)

    def out(buckets):
        def work(rank):
            own = [layout.shard(x, rank.rank) for x in (q, k, v, buckets)]
            return mixers.hashed(*own, blocks=blocks, group=rank)

        return layout.unshard(VirtualWorld(2, 60).run(work))

    first = out(buckets)
    assert buckets[0, -1, 0, 0] == 1
    buckets[:, -1] = 0  # in the order before all of the other bucket
    assert (out(buckets) - first)[:, :-1].abs().max() < 1e-12  # on other ranks in another order


@pytest.mark.parametrize("kind", LAYOUTS)
def test_ties_are_broken_alike_on_all_splits(kind):
    """Small whole numbers, so that products and means are exact and many scores equal."""
    n, lengths = 64, [40, 24]

    def change(inputs):
        for key, x in inputs.items():
            inputs[key] = x.round().clamp(-1, 1)

    family_size = 4
    mask = ra.masks.documents(lengths)
    outs = []
    for world in (1, 2, 3, 4):
        layout = ra.layouts.build(kind, mask, world)
        blocks = ra.make_blocks(mask, layout, family_size)
        inputs, _ = inputs_of(FAMILIES["moba"], n, 7)
        change(inputs)

        def work(rank, layout=layout, blocks=blocks, inputs=inputs):
            q, k = (layout.shard(inputs[key], rank.rank).float() for key in "qk")
            return moba_choice(q, k, blocks, 4, rank)

        outs.append(layout.unshard(VirtualWorld(world, 60).run(work)))
    assert all(torch.equal(outs[0], one) for one in outs[1:])
    # Of equals the first: where all scores are alike, the document's first blocks.
    layout = ra.layouts.build(kind, mask, 2)
    blocks = ra.make_blocks(mask, layout, family_size)

    def alike(rank):
        x = torch.ones(1, layout.count(rank.rank), 1, 4)
        return moba_choice(x, x, blocks, 3, rank)

    ids = layout.unshard(VirtualWorld(2, 60).run(alike))[0, :, 0]
    assert ids[39].tolist() == [0, 1] and ids[63].tolist() == [10, 11]
    assert ids[0].tolist() == [-1, -1] and ids[44].tolist() == [10, -1]


def test_what_moves_is_what_the_plans_say():
    """Of a choice: every byte of K and V, forward and backward, is the plan's."""
    n, world = 96, 4
    layout = ra.layouts.zigzag(n, world)
    blocks = ra.make_blocks(ra.masks.causal(n), layout, 8)
    inputs, _ = inputs_of(FAMILIES["moba"], n, 1)

    def work(rank):
        q, k, v = (layout.shard(inputs[key], rank.rank).requires_grad_() for key in "qkv")
        part = chosen_part(q, k, v, moba_choice(q, k, blocks, 3, rank), blocks, rank)
        counted = Counted(rank)
        out = mixers.union(q, [part], counted)
        forward = counted.received
        out.backward(torch.ones_like(out))
        return part.plan, forward, counted.received - forward

    found = VirtualWorld(world, 60).run(work)
    plan = found[0][0]
    usual = ra.make_plan(plan.mask, plan.layout, "direct", key_layout=plan.key_layout)
    for rank in range(world):
        for of in (usual.area, usual.recv_tokens, usual.grad_recv_tokens):
            assert getattr(plan, of.__name__)(rank) == of(rank)
    left, right = Figure().subplots(1, 2)  # drawn like any
    draw_mask(left, plan)
    draw_work(right, plan)
    row = 2 * DIM * 8  # K and V of one head, float64
    for rank, (plan, forward, backward) in enumerate(found):
        assert forward == plan.recv_tokens(rank) * row > 0
        assert backward == (plan.recv_tokens(rank) + plan.grad_recv_tokens(rank)) * row
        assert prove.check(plan).ok


@pytest.mark.parametrize("clustered", [False, True])
def test_blocks_that_nobody_chose_do_not_travel(clustered):
    """64 ranks: of the rows that a ring would bring, those that some query of the rank chose."""
    n, world, size = 4096, 64, 16
    layout = ra.layouts.contiguous(n, world)
    blocks = ra.make_blocks(ra.masks.causal(n), layout, size)
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, n, 2, DIM, generator=draw) for _ in range(2))
    if clustered:  # neighbours ask for alike, so they choose alike
        topic = torch.randn(1, n // 64, 2, DIM, generator=draw).repeat_interleave(64, 1)
        q = q + 4 * topic

    def work(rank):
        own = [layout.shard(x, rank.rank) for x in (q, k, k)]
        return chosen_part(*own, moba_choice(*own[:2], blocks, 4, rank), blocks, rank).plan

    plans = VirtualWorld(world, 120).run(work)
    chosen = sum(plan.recv_tokens(rank) for rank, plan in enumerate(plans))
    attended = plans[0].partition.attended_keys
    needed = sum(len(keys) for runs in attended for keys in runs)
    own = 0  # chosen rows that the rank has itself
    for rank in range(world):
        mine = {(run.start, run.stop) for run in plans[0].key_layout.runs[rank]}
        for keys in attended[rank]:
            own += sum(max(0, min(keys.stop, b) - max(keys.start, a)) for a, b in mine)
    assert chosen == needed - own
    # Two heads; a ring brings every earlier rank's rows.
    ring = 2 * sum(
        ra.make_plan(ra.masks.causal(n), layout, "ring").recv_tokens(rank) for rank in range(world)
    )
    assert chosen < (0.25 if clustered else 0.75) * ring


def test_a_choice_may_not_be_of_the_future_or_of_another_document():
    lengths = [16, 16]
    layout = ra.layouts.contiguous(32, 2)
    blocks = ra.make_blocks(ra.masks.documents(lengths), layout, 4)
    inputs, _ = inputs_of(FAMILIES["moba"], 32, 0)

    def attempt(token, block):
        ids = torch.full((2, 32, KV_HEADS, 1), -1)
        ids[:, token] = block

        def work(rank):
            own = [layout.shard(inputs[key], rank.rank) for key in "qkv"]
            return mixers.selected(*own, layout.shard(ids, rank.rank), blocks=blocks, group=rank)

        return VirtualWorld(2, 60).run(work)

    attempt(7, 0)
    attempt(7, 1)  # it ends with the token
    for token, block in ((7, 2), (6, 1), (20, 3), (20, 8), (20, -2)):
        with pytest.raises(ValueError, match="a chosen block"):
            attempt(token, block)


@pytest.mark.parametrize("kernel", ["triton", "aten"])
def test_a_choice_runs_on_the_block_kernels(kernel):
    """Work lists of each head by itself, in Triton's interpreter."""
    n, lengths = 40, [25, 15]
    layout = ra.layouts.zigzag(n, 2)
    blocks = ra.make_blocks(ra.masks.documents(lengths), layout, 5)
    draw = torch.Generator().manual_seed(0)
    q, k, v, d_out = (torch.randn(1, n, heads, 16, generator=draw) for heads in (4, 2, 2, 4))
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    want = naive_attention.moba(*leaves, 5, 3, lengths)
    grads = torch.autograd.grad(want, leaves, d_out.double())

    def work(rank):
        own = [layout.shard(x, rank.rank).requires_grad_() for x in (q, k, v)]
        out = mixers.moba(*own, blocks=blocks, top_k=3, group=rank, kernel=kernel)
        return out.detach(), *torch.autograd.grad(out, own, layout.shard(d_out, rank.rank))

    found = VirtualWorld(2, 300).run(work)
    for i, wanted in enumerate((want.detach(), *grads)):
        assert oracle.error(layout.unshard([x[i] for x in found]), wanted) < 1e-5


@pytest.mark.parametrize("name", ["window and summaries", "moba", "nsa", "hashed"])
def test_recomputed_in_the_backward(name):
    layout, lengths = ra.layouts.zigzag(61, 3), [20, 30, 11]
    family = FAMILIES[name]
    inputs, d_out = inputs_of(family, 61, 0)
    blocks = blocks_of(family, layout, lengths)

    def work(rank, again):
        own = {k: layout.shard(x, rank.rank).requires_grad_() for k, x in inputs.items()}

        def forward(*tensors):
            return family.split(dict(zip(own, tensors, strict=True)), blocks, rank)

        if again:
            out = checkpoint(forward, *own.values(), use_reentrant=False)
        else:
            out = forward(*own.values())
        out.backward(layout.shard(d_out, rank.rank))
        return [x.grad for x in own.values()]

    plain, again = (
        VirtualWorld(3, 60).run(lambda rank, again=again: work(rank, again))
        for again in (False, True)
    )
    assert all(torch.equal(a, b) for x, y in zip(plain, again, strict=True)
               for a, b in zip(x, y, strict=True))  # fmt: skip


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5), size=st.integers(1, 9),
    stride=st.integers(1, 9), near=st.integers(1, 3), ratio=st.integers(2, 4),
)  # fmt: skip
def test_masks_of_summaries(lengths, size, stride, near, ratio):
    """Every earlier token counts once; no summary is seen before its block has ended."""
    n = sum(lengths)
    blocks = Blocks(ra.layouts.contiguous(n, 1), lengths, size)
    coarse = blocks.of(size * ratio)
    counts = blocks.near(near).to_dense().astype(int)
    for level, mask in ((blocks, blocks.past(near, coarse)), (coarse, coarse.past(near))):
        holds = np.zeros((len(level), n), int)
        for block, (start, stop) in enumerate(zip(level.starts, level.stops, strict=True)):
            holds[block, start:stop] = 1
        counts += mask.to_dense().astype(int) @ holds
    assert (counts == ra.masks.documents(lengths).to_dense()).all()
    overlapping = Blocks(ra.layouts.contiguous(n, 1), lengths, max(size, stride), stride)
    seen = overlapping.ended().to_dense()
    document = np.repeat(np.arange(len(lengths)), lengths)
    for block, (start, stop) in enumerate(zip(overlapping.starts, overlapping.stops, strict=True)):
        may = (document == document[start]) & (np.arange(n) >= stop - 1)
        assert (seen[:, block] == may).all()
        assert (overlapping.whole().to_dense()[:, block] == (document == document[start])).all()


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4), size=st.integers(1, 9),
    world=st.integers(1, 5), picks=st.integers(0, 4),
)  # fmt: skip
def test_pieces_cover_blocks_and_stand_ins_have_as_many_pairs(lengths, size, world, picks):
    mask = ra.masks.documents(lengths)
    blocks = Blocks(ra.layouts.build("balanced", mask, world), lengths, size)
    covered = np.zeros(mask.n_q, int)
    for rank, block, first, stop in zip(
        *(getattr(blocks.pieces, x) for x in ("rank", "block", "first", "stop")), strict=True
    ):
        at = blocks.layout.positions(rank)[first:stop]
        assert ((at >= blocks.starts[block]) & (at < blocks.stops[block])).all()
        covered[at] += 1
    assert (covered == 1).all()
    assert all(
        blocks.stops[b] - 1 in blocks.layout.positions(blocks.owner[b]) for b in range(len(blocks))
    )
    earlier = np.arange(len(blocks)) - blocks.firsts[blocks.document]
    pairs = (np.minimum(earlier, picks) * size * (blocks.stops - blocks.starts)).sum()
    assert expected(blocks, picks).area == pairs
    assert not (expected(blocks, picks) - mask).area


REFUSED = {
    "striped": (lambda: ra.make_blocks(ra.masks.causal(8), ra.layouts.striped(8, 2), 2), "scatter"),
    "window": (
        lambda: ra.make_blocks(ra.masks.sliding_window(8, 2), ra.layouts.contiguous(8, 1), 2),
        "must be causal",
    ),
    "gaps": (
        lambda: ra.make_blocks(ra.masks.causal(8), ra.layouts.contiguous(8, 1), 2, 3),
        "leave out",
    ),
    "degree": (
        lambda: ra.make_blocks(ra.masks.causal(8), ra.layouts.contiguous(8, 2), 2, None, 3),
        "does not divide",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused(what):
    attempt, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        attempt()


def test_mixers_refuse_what_they_cannot():
    n = 12
    x = torch.randn(1, n, 4, 8)
    blocks = ra.make_blocks(ra.masks.causal(n), ra.layouts.contiguous(n, 1), 4)
    plan = ra.make_plan(ra.masks.causal(n), blocks.layout)
    for attempt, message in (
        (lambda: mixers.moba(x, x, x, blocks=blocks, top_k=0), "top_k"),
        (lambda: mixers.pooled(x, x, x, blocks=[blocks, blocks.of(6)]), "not made of"),
        (lambda: mixers.pooled(x, x, x, blocks=blocks, near=0), "near"),
        (lambda: mixers.pooled(x, x, x, blocks=[blocks, blocks.of(8)], causal=False), "causal"),
        (lambda: mixers.pool(x, blocks, how="softmax"), "needs weights"),
        (lambda: mixers.pool(x[:, 1:], blocks), "pool: x must be"),
        (lambda: mixers.dsa(x, x, x, x, x[:, :, 0], x[..., 0], blocks=blocks, top_k=2), "size 1"),
        (lambda: mixers.hashed(x, x, x, x[..., :1].long()[:, 1:], blocks=blocks), "buckets must"),
        (lambda: mixers.hashed(x, x, x, x[..., :1], blocks=blocks), "buckets must be int64"),
        (lambda: mixers.selected(x, x, x, x[..., :1], blocks=blocks), "ids must be int64"),
        (lambda: mixers.adaptive_span(x, x, x, torch.ones(3), blocks=blocks), "spans must be"),
        (lambda: mixers.linformer(x, x, x, x[0, :4, 0], x[0, :4, 0], blocks=blocks), "linformer"),
        (
            lambda: mixers.selected(x, x, x, torch.zeros(1, n, 3, 1).long(), blocks=blocks),
            "ids must be",
        ),
        (lambda: mixers.union(x, []), "a part at least"),
        (lambda: mixers.union(x, [mixers.Part(x[:, 1:], x, plan)]), "k has 11 rows"),
        (lambda: mixers.union(x, [mixers.Part(x.double(), x, plan)]), "float64"),
        (lambda: mixers.union(x, [mixers.Part(x[:, :, :3], x[:, :, :3], plan)]), "divide 4"),
        (
            lambda: mixers.combine(x, [mixers.Part(x, x, plan)], [mixers.State(x, x[..., 0])]),
            "a state needs",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()


def test_a_choice_compiles_for_a_gpu():
    """In a process of its own: here Triton only interprets."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests/workers/choice_ahead.py"],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "compiled 3" in done.stdout, done.stderr


def test_a_maximum_that_several_tokens_share_has_one_gradient():
    """However the tokens of a block are split, in chunks too: an even share for each."""
    n, size = 210, 100
    x = torch.randint(0, 2, (1, n, 1, 2), generator=torch.Generator().manual_seed(0)).double()
    shares = torch.zeros_like(x)
    for start in range(0, n, size):
        part = x[:, start : start + size]
        hit = (part == part.amax(1, keepdim=True)).double()
        shares[:, start : start + size] = hit / hit.sum(1, keepdim=True)
    for world in (1, 3):
        layout = ra.layouts.zigzag(n, world)
        blocks = ra.make_blocks(ra.masks.causal(n), layout, size)

        def work(rank, layout=layout, blocks=blocks):
            own = layout.shard(x, rank.rank).requires_grad_()
            mixers.pool(own, blocks, rank, "max").sum().backward()
            return own.grad

        got = layout.unshard(VirtualWorld(world, 60).run(work))
        assert (got - shares).abs().max() < 1e-12


@pytest.mark.parametrize("size", [1.0, 8.0, 40.0])
def test_features_that_are_far_from_exp_stay_finite(size):
    """Norms at which random features are off by orders of magnitude, or underflow."""
    n = 64
    draw = torch.Generator().manual_seed(0)
    q, k = (size * torch.randn(1, n, 2, 16, generator=draw) for _ in range(2))
    v = torch.randn(1, n, 2, 16, generator=draw)
    blocks = ra.make_blocks(ra.masks.documents([50, 14]), ra.layouts.zigzag(n, 2), 8)
    projection = torch.randn(16, 16, generator=draw)

    def work(rank):
        own = [blocks.layout.shard(x, rank.rank).requires_grad_() for x in (q, k, v)]
        maps = (mixers.features.performer(x * 0.5, projection) for x in own[:2])
        out = mixers.scatterbrain(*own, *maps, blocks=blocks, group=rank)
        return out.detach(), *torch.autograd.grad(out.sum(), own)

    assert all(x.isfinite().all() for found in VirtualWorld(2, 60).run(work) for x in found)
