"""The backward kernel for Hopper: five products, and dq summed in a fixed order.

A program is a tile of N keys of one K/V head: eight warps that compute, a warp that loads, and
WRITERS warps that add to dq. dk and dv stay in registers over all tiles of queries and all heads of
the group. Scores are held transposed, [keys, queries]: then P^T and dS^T are the left operands of
dv and dk in the registers where they were computed; only dS goes through shared memory, for dq.

Each tile's dq goes through shared memory to a writer, which adds it to the float32 sums by a TMA
reduction. Additions to one tile of queries are taken in the order of the list: ``sems`` holds the
number of the visit that has added last, and a writer waits for the one before its own. So the same
bits come out every time. Visits are walked from their last tile to the first: then, for causal
masks and for windows, the tile of keys before has already passed where this one comes to.

A program waits only for places before its own, and draws its place when it starts (``ticket``):
whoever is waited for is running. So there is no deadlock, in whatever order the GPU starts programs,
and however few of them fit.

Five products are those of Dao 2023, "FlashAttention-2"; there dq is summed in any order.
"""

from ringattn.kernels.gluon.tile import (
    COLUMN_START,
    FIRST,
    FULL_FROM,
    FULL_TO,
    TILES,
    VISIT,
    inside,
    matrix,
    place,
    tanh,
    window,
)
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

TICKET = gl.constexpr(4)  # int32 of room for the first counter, the ticket


@gluon.jit
def _sweep(
    begin, end, n, visit, b_dk, b_dv, keys, queries, scale, cap, bufs, bars,
    STAGES: gl.constexpr, WRITERS: gl.constexpr, MASK: gl.constexpr, CAPPED: gl.constexpr,
    S: gl.constexpr,
):  # fmt: skip
    """Tiles ``begin .. end`` of a visit, from its end on; tile i is the ``n + i``-th of this
    program."""
    ks, vs, qs, dos, lses, deltas, dss, dqs = bufs
    q_ready, do_ready, free, dq_ready, dq_free = bars
    k = matrix(ks)
    v = matrix(vs)
    N: gl.constexpr = k.shape[0]
    M: gl.constexpr = qs.shape[2]
    D: gl.constexpr = k.shape[1]
    A: gl.constexpr = gl.DotOperandLayout(0, b_dk.type.layout, 2)
    G: gl.constexpr = gl.DotOperandLayout(0, b_dv.type.layout, 2)
    Q: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, D // 2, 16])
    zero = gl.zeros([N, M], gl.float32, S)
    zero_q = gl.zeros([M, D], gl.float32, Q)
    for i in range(begin, end):
        t = n + i
        slot = t % STAGES
        phase = t // STAGES & 1
        q = matrix(qs.index(slot))
        do = matrix(dos.index(slot))
        if MASK:  # loaded here: it comes while the product runs
            at = (gl.load(visit + TILES) - 1 - i) * M
            left, right = window(visit, keys)
        mbarrier.wait(q_ready.index(slot), phase)
        # [N, M]: scores of keys by queries
        b_s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(do_ready.index(slot), phase)
        b_dp = warpgroup_mma(v, do.permute((1, 0)), zero, use_acc=False, is_async=True)
        b_s = warpgroup_mma_wait(1, deps=(b_s,))
        b_lse = lses.index(slot).load(S)  # [1, M]
        if CAPPED:
            bent = tanh(b_s * scale)
            b_s = bent * cap - b_lse
        else:
            b_s = b_s * scale - b_lse
        if MASK:
            allowed = inside(left - at, right - at, queries)
        b_p = gl.exp2(b_s)
        if MASK:  # here, not at s: it takes two registers less
            b_p = gl.where(allowed, b_p, 0.0)
        b_p_low = gl.convert_layout(b_p.to(q.dtype), G)
        b_slope = b_p
        if CAPPED:
            b_slope = b_p * (1 - bent * bent)
        # The writer has emptied the buffer for dq. Waited for here: as in the forward, the end of a
        # basic block keeps the wait for dp below the exponentials.
        mbarrier.wait(dq_free, t & 1 ^ 1)
        b_dp = warpgroup_mma_wait(0, deps=(b_dp,))
        b_dv = warpgroup_mma(b_p_low, do, b_dv, is_async=True)
        b_ds = (b_slope * (b_dp - deltas.index(slot).load(S))).to(q.dtype)
        dss.store(b_ds)
        fence_async_shared()
        # [M, D]
        b_dq = warpgroup_mma(dss.permute((1, 0)), k, zero_q, use_acc=False, is_async=True)
        b_dk = warpgroup_mma(gl.convert_layout(b_ds, A), q, b_dk, is_async=True)
        b_dv, b_dq = warpgroup_mma_wait(1, deps=(b_dv, b_dq))
        matrix(dqs).store(b_dq)  # while the product for dk runs
        fence_async_shared()
        mbarrier.arrive(dq_ready.index(t % WRITERS), count=1)
        b_dk = warpgroup_mma_wait(0, deps=(b_dk,))
        mbarrier.arrive(free.index(slot), count=1)  # of q and do: the loader fills both again
    return b_dk, b_dv


@gluon.jit
def _write(x, strides, b, h, m, rows, b_x, D: gl.constexpr, ADD: gl.constexpr):
    """b_x [N, SIZE] to the rows m of x, of which [rows, D] exist, or with ADD onto it; offsets are
    64 bit. A launch adds once to every element, so the order of atomic additions says nothing; they
    take fewer registers than to load, add and store."""
    L: gl.constexpr = b_x.type.layout
    m = gl.convert_layout(m, gl.SliceLayout(1, L))
    d = gl.arange(0, b_x.shape[1], gl.SliceLayout(0, L))[None, :]
    base = x + gl.cast(b, gl.int64) * strides[0] + gl.cast(h, gl.int64) * strides[2]
    p_x = base + (m.to(gl.int64) * strides[1])[:, None] + d
    exist = (m < rows)[:, None]
    if b_x.shape[1] > D:
        exist = exist & (d < D)
    if ADD:
        gl.atomic_add(p_x, b_x, mask=exist, sem="relaxed")
    else:
        gl.store(p_x, b_x.to(x.dtype.element_ty), mask=exist)


@gluon.jit
def _compute(
    grads, lists, spot, sizes, scale, cap, sm_scale, bufs, k_ready, bars,
    D: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr, WRITERS: gl.constexpr,
    ADD: gl.constexpr, CAPPED: gl.constexpr,
):  # fmt: skip
    dk_out, dv_out, dk_strides, dv_strides = grads
    tiles, visits, turns = lists
    index, first, begin, end, b, h = spot
    rows, heads, group, batch_heads, together, tile_count = sizes
    N: gl.constexpr = bufs[0].shape[1]
    M: gl.constexpr = bufs[2].shape[2]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, M, 16])
    K: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, bufs[0].shape[3], 16])
    V: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, bufs[1].shape[3], 16])
    keys = first + gl.arange(0, N, gl.SliceLayout(1, S))
    queries = gl.arange(0, M, gl.SliceLayout(0, S))
    b_dk = gl.zeros([N, bufs[0].shape[3]], gl.float32, K)  # [N, D]
    b_dv = gl.zeros([N, bufs[1].shape[3]], gl.float32, V)  # [N, DV]
    mbarrier.wait(k_ready, 0)
    n = 0  # tiles of queries so far
    # All visits of one head, then of the next. Of each first the masked tiles at its end, then
    # those without a mask and the masked ones before them.
    for _member in range(group):
        for number in range(begin, end):
            visit = visits + VISIT * number
            for late in range(2):
                upper = gl.load(visit + TILES) - gl.load(visit + FULL_TO)
                lower = upper + late * (gl.load(visit + FULL_TO) - gl.load(visit + FULL_FROM))
                b_dk, b_dv = _sweep(
                    upper, lower, n, visit, b_dk, b_dv, keys, queries, scale, cap, bufs, bars,
                    STAGES, WRITERS, False, CAPPED, S,
                )  # fmt: skip
                # Loaded again, so that the loop above need not keep them.
                after = late * (gl.load(visit + TILES) - gl.load(visit + FULL_FROM))
                until = gl.load(visit + TILES) - (1 - late) * gl.load(visit + FULL_TO)
                b_dk, b_dv = _sweep(
                    after, until, n, visit, b_dk, b_dv, keys, queries, scale, cap, bufs, bars,
                    STAGES, WRITERS, True, CAPPED, S,
                )  # fmt: skip
            n += gl.load(visit + TILES)
    # Found again, from a zero that the compiler cannot see through: else it keeps both in registers
    # from the start on, and spills.
    tile, b, h = place(index + gl.load(tiles + 1), heads, batch_heads, together, tile_count)
    _write(dv_out, dv_strides, b, h, keys, rows, b_dv, DV, ADD)
    _write(dk_out, dk_strides, b, h, keys, rows, b_dk * sm_scale, D, ADD)


@gluon.jit
def _loader(
    descs, lists, spot, heads, group, bufs, k_ready, bars, STAGES: gl.constexpr
):  # fmt: skip
    q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc = descs
    tiles, visits, turns = lists
    index, first, begin, end, b, h = spot
    ks, vs, qs, dos, lses, deltas, dss, dqs = bufs
    q_ready, do_ready, free, dq_ready, dq_free = bars
    M: gl.constexpr = qs.shape[2]
    mbarrier.expect(k_ready, k_desc.nbytes_per_cta + v_desc.nbytes_per_cta)
    tma.async_load(k_desc, [b, first, h, 0], k_ready, ks)
    tma.async_load(v_desc, [b, first, h, 0], k_ready, vs)
    t = 0
    for g in range(group):
        head = h * group + g
        row = b * heads * group + head  # of lse and delta
        for number in range(begin, end):
            visit = visits + VISIT * number
            origin = gl.load(visit + COLUMN_START) + gl.load(visit + FIRST)
            count = gl.load(visit + TILES)
            for i in range(count):
                at = origin + (count - 1 - i) * M
                slot = t % STAGES
                mbarrier.wait(free.index(slot), t // STAGES & 1 ^ 1)
                mbarrier.expect(
                    q_ready.index(slot), q_desc.nbytes_per_cta + lse_desc.nbytes_per_cta
                )
                tma.async_load(q_desc, [b, at, head, 0], q_ready.index(slot), qs.index(slot))
                tma.async_load(lse_desc, [row, at], q_ready.index(slot), lses.index(slot))
                mbarrier.expect(
                    do_ready.index(slot), do_desc.nbytes_per_cta + delta_desc.nbytes_per_cta
                )
                tma.async_load(do_desc, [b, at, head, 0], do_ready.index(slot), dos.index(slot))
                tma.async_load(delta_desc, [row, at], do_ready.index(slot), deltas.index(slot))
                t += 1


@gluon.jit
def _writer(
    dq_desc, sems, lists, spot, heads, group, blocks, bufs, bars,
    WHICH: gl.constexpr, WRITERS: gl.constexpr,
):  # fmt: skip
    """Adds every WRITERS-th tile of dq: while one is on its way, the next can already follow."""
    tiles, visits, turns = lists
    index, first, begin, end, b, h = spot
    ks, vs, qs, dos, lses, deltas, dss, dqs = bufs
    q_ready, do_ready, free, dq_ready, dq_free = bars
    M: gl.constexpr = qs.shape[2]
    n = 0
    for g in range(group):
        head = h * group + g
        own = sems + (gl.cast(b, gl.int64) * heads * group + head) * blocks
        for number in range(begin, end):
            visit = visits + VISIT * number
            origin = gl.load(visit + COLUMN_START) + gl.load(visit + FIRST)
            count = gl.load(visit + TILES)
            awaited = gl.load(turns + 2 * number)
            number_own = gl.load(turns + 2 * number + 1)
            for i in range((WHICH + WRITERS - n % WRITERS) % WRITERS, count, WRITERS):
                at = origin + (count - 1 - i) * M
                gl.atomic_poll(own + at // M, awaited, sem="acquire")
                mbarrier.wait(dq_ready.index(WHICH), (n + i) // WRITERS & 1)
                tma.async_atomic_add(dq_desc, [b, at, head, 0], dqs)
                tma.store_wait(0)  # the buffer has been read
                mbarrier.arrive(dq_free, count=1)
                tma.store_wait(0, read_only=False)  # the sums are in memory
                gl.atomic_xchg(own + at // M, number_own, sem="release")
            n += count


@gluon.jit(do_not_specialize=["rows", "heads", "group", "batch_heads", "together", "tile_count", "blocks"])  # fmt: skip
def backward(
    q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc, dq_desc, dk, dv, counters,
    tiles, visits, turns, dk_strides, dv_strides,
    rows, heads, group, batch_heads, together, tile_count, blocks, scale, cap, sm_scale,
    D: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr, WRITERS: gl.constexpr,
    ADD: gl.constexpr, CAPPED: gl.constexpr,
):  # fmt: skip
    """Blocks of the descriptors: q, do, dq [1, M, 1, SIZE], k, v [1, N, 1, SIZE] of ``[batch, tokens,
    heads, head_dim]``; lse (base 2) and delta = sum(do * out) [1, M] of ``[batch * heads,
    queries]``. ``rows`` and ``heads`` are those of k. ``scale`` and ``cap`` as in the forward;
    dq comes out without ``sm_scale``, which its last reader applies. ``counters`` int32
    [TICKET + batch * heads of q * blocks] are zero: the places drawn, and the semaphores. Grid:
    tile_count * batch_heads."""
    M: gl.constexpr = q_desc.block_shape[1]
    N: gl.constexpr = k_desc.block_shape[1]
    index = gl.atomic_add(counters, 1, sem="relaxed")
    sems = counters + TICKET
    tile, b, h = place(index, heads, batch_heads, together, tile_count)
    at = tiles + 3 * tile
    spot = (index, gl.load(at), gl.load(at + 1), gl.load(at + 2), b, h)

    across: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, M], q_desc.dtype)
    bufs = (
        gl.allocate_shared_memory(k_desc.dtype, [1, N, 1, k_desc.block_shape[3]], k_desc.layout),
        gl.allocate_shared_memory(v_desc.dtype, [1, N, 1, v_desc.block_shape[3]], v_desc.layout),
        gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, M, 1, q_desc.block_shape[3]], q_desc.layout),
        gl.allocate_shared_memory(do_desc.dtype, [STAGES, 1, M, 1, do_desc.block_shape[3]], do_desc.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, M], lse_desc.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, M], delta_desc.layout),
        gl.allocate_shared_memory(q_desc.dtype, [N, M], across),
        gl.allocate_shared_memory(gl.float32, [1, M, 1, dq_desc.block_shape[3]], dq_desc.layout),
    )  # fmt: skip
    k_ready = mbarrier.allocate_mbarrier()
    q_ready = mbarrier.allocate_mbarrier(batch=STAGES)
    do_ready = mbarrier.allocate_mbarrier(batch=STAGES)
    free = mbarrier.allocate_mbarrier(batch=STAGES)
    dq_ready = mbarrier.allocate_mbarrier(batch=WRITERS)
    dq_free = mbarrier.allocate_mbarrier()
    mbarrier.init(k_ready, count=1)
    for i in gl.static_range(WRITERS):
        mbarrier.init(dq_ready.index(i), count=1)
    mbarrier.init(dq_free, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(do_ready.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    bars = (q_ready, do_ready, free, dq_ready, dq_free)
    descs = (q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc)
    grads = (dk, dv, dk_strides, dv_strides)
    lists = (tiles, visits, turns)
    sizes = (rows, heads, group, batch_heads, together, tile_count)
    if WRITERS == 1:
        gl.warp_specialize(
            [
                (_compute, (grads, lists, spot, sizes, scale, cap, sm_scale, bufs, k_ready, bars, D, DV, STAGES, WRITERS, ADD, CAPPED)),
                (_loader, (descs, lists, spot, heads, group, bufs, k_ready, bars, STAGES)),
                (_writer, (dq_desc, sems, lists, spot, heads, group, blocks, bufs, bars, 0, WRITERS)),
            ],
            [1, 1],
            [24, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_compute, (grads, lists, spot, sizes, scale, cap, sm_scale, bufs, k_ready, bars, D, DV, STAGES, WRITERS, ADD, CAPPED)),
                (_loader, (descs, lists, spot, heads, group, bufs, k_ready, bars, STAGES)),
                (_writer, (dq_desc, sems, lists, spot, heads, group, blocks, bufs, bars, 0, WRITERS)),
                (_writer, (dq_desc, sems, lists, spot, heads, group, blocks, bufs, bars, 1, WRITERS)),
            ],
            [1, 1, 1],
            [24, 24, 24],
        )  # fmt: skip
