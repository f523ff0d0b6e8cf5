"""The forward kernel for Hopper: a producer warp and two warpgroups of 64 queries each.

A program walks tiles of 128 queries of one head, and of each tile the visits. The producer draws
the tiles, one after the other, from a counter that all programs share (``ticket``), and copies K and
V tiles by TMA into rings of STAGES buffers. It runs ahead, across visits and tiles; so the copies
never stop, however short the documents. A consumer issues S = Q K_j^T and
O += P_{j-1} V_{j-1} together and computes the softmax of tile j while the second product runs (Shah
et al. 2024, "FlashAttention-3", algorithm 2); the two consumers fall into turns by themselves, as
each needs the matrix unit while the other computes exponentials.

The online softmax begins, in base 2, where the steps before have ended: their log-sum-exp is the
first maximum m, of weight l = 1, their output the first accumulator acc.
"""

from ringattn.kernels.gluon.tile import (
    COLUMN_START,
    FIRST,
    FULL_FROM,
    FULL_TO,
    TILES,
    VISIT,
    column,
    inside,
    matrix,
    place,
    scores,
    tanh,
    window,
)
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _softmax(b_s, m, l, scale, cap, begin, end, columns, MASK: gl.constexpr, CAPPED: gl.constexpr):
    """(b_p float32 [rows, columns], m, l, alpha: what the accumulator so far is to be scaled by)."""
    if CAPPED:
        b_s = tanh(b_s * scale) * cap
        scale = 1.0
    if MASK:
        b_s = gl.where(inside(begin, end, columns), b_s, float("-inf"))
    m_new = gl.maximum(m, gl.max(b_s, 1) * scale)
    level = m_new
    if MASK:  # a row without a key so far: 0 for -inf keeps exp2 free of NaN
        level = gl.where(m_new == float("-inf"), 0.0, m_new)
    # The scale rides along in one fused multiply-add per element.
    b_p = gl.exp2(b_s * scale - level[:, None])
    alpha = gl.exp2(m - level)
    return b_p, m_new, l * alpha + gl.sum(b_p, 1), alpha


@gluon.jit
def _sweep(
    begin, end, n, full_from, full, left, right, bufs, bars, b_p, acc, m, l, scale, cap, columns,
    WG: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr,
    MASK: gl.constexpr, CAPPED: gl.constexpr,
):  # fmt: skip
    """Tiles ``begin .. end`` of a visit, whose tile i is the ``n + i``-th of this program; ``b_p``
    is that of the tile before. K of the first one has been waited for."""
    qs, ks, vs, spots = bufs
    k_ready, k_free, v_ready, v_free, q_ready, q_free, spot_ready = bars
    M: gl.constexpr = qs.shape[2]
    N: gl.constexpr = ks.shape[2]
    zero = gl.zeros([M, N], gl.float32, m.type.layout.parent)
    for i in range(begin, end):
        j = n + i
        before = j - 1
        b_s = scores(qs, ks, zero, WG * CHUNKS, j % STAGES * CHUNKS, CHUNKS)
        mbarrier.wait(v_ready.index(before % STAGES), before // STAGES & 1)
        acc = warpgroup_mma(b_p, matrix(vs.index(before % STAGES)), acc, is_async=True)
        b_s = warpgroup_mma_wait(1, deps=(b_s,))
        mbarrier.arrive(k_free.index(j % STAGES), count=1)
        at = 0
        if MASK:
            at = column(i, full_from, full) * N
        b_p_new, m, l, alpha = _softmax(
            b_s, m, l, scale, cap, left - at, right - at, columns, MASK, CAPPED
        )
        after = j + 1
        # The next K tile. It stands here, not at the top of the loop: a wait on a barrier ends a
        # basic block, and without one ptxas moves the wait for the product above the exponentials.
        mbarrier.wait(k_ready.index(after % STAGES), after // STAGES & 1)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(v_free.index(before % STAGES), count=1)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
        b_p = gl.convert_layout(b_p_new.to(b_p.dtype), b_p.type.layout)
    return b_p, acc, m, l


@gluon.jit
def _state(x, strides, b, h, first, rows, M: gl.constexpr, D: gl.constexpr, SIZE: gl.constexpr, L: gl.constexpr):  # fmt: skip
    """(pointers, mask) of a tile [M, SIZE] of x, of which [rows, D] exist; offsets are 64 bit."""
    m = first + gl.arange(0, M, gl.SliceLayout(1, L))
    d = gl.arange(0, SIZE, gl.SliceLayout(0, L))[None, :]
    base = x + gl.cast(b, gl.int64) * strides[0] + gl.cast(h, gl.int64) * strides[2]
    exist = (m < rows)[:, None]
    if SIZE > D:
        exist = exist & (d < D)
    return base + (m.to(gl.int64) * strides[1])[:, None] + d, exist


@gluon.jit
def _draw(ticket, drawn, spots, spot_ready):
    """The next place in the order of work, drawn for all partitions of this program, into one of
    four spots. Both consumers have done with the place four before: they have released Q of the
    tile two before, or the tile before this one would not have its Q."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    slot = drawn % 4
    index = gl.atomic_add(ticket, 1, sem="relaxed")
    spots.index(slot).store(gl.full([32], index, gl.int32, L))
    mbarrier.arrive(spot_ready.index(slot), count=1)
    return index


@gluon.jit
def _read(drawn, spots):
    """What the producer has drawn."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(spots.index(drawn % 4).load(L), 0)


@gluon.jit
def _drawn(drawn, spots, spot_ready):
    """What the producer draws, once it has."""
    mbarrier.wait(spot_ready.index(drawn % 4), drawn // 4 & 1)
    return _read(drawn, spots)


@gluon.jit
def _consumer(
    state, lists, sizes, scale, cap, bufs, bars,
    WG: gl.constexpr, DV: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr,
    ADD: gl.constexpr, CAPPED: gl.constexpr,
):  # fmt: skip
    partial, out, lse, strides = state
    tiles, visits, ticket = lists
    rows, heads, group, batch_heads, together, tile_count = sizes
    qs, ks, vs, spots = bufs
    k_ready, k_free, v_ready, v_free, q_ready, q_free, spot_ready = bars
    M: gl.constexpr = qs.shape[2]
    N: gl.constexpr = ks.shape[2]
    SIZE: gl.constexpr = vs.shape[4]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    columns = gl.arange(0, N, gl.SliceLayout(0, S))
    zero = gl.zeros([M, N], gl.float32, S)

    n = 0  # tiles of columns so far, over all tiles of queries
    turn = 0  # tiles of queries with work so far
    drawn = 0  # tiles of queries so far
    index = _drawn(drawn, spots, spot_ready)
    while index < batch_heads * tile_count:
        tile, b, h = place(index, heads, batch_heads, together, tile_count)
        first = gl.load(tiles + 3 * tile) + WG * M
        begin = gl.load(tiles + 3 * tile + 1)
        end = gl.load(tiles + 3 * tile + 2)
        row = first + gl.arange(0, M, gl.SliceLayout(1, S))
        p_lse = lse + (gl.cast(b, gl.int64) * heads + h) * rows
        m = gl.load(p_lse + row, mask=row < rows, other=float("-inf")) * 1.4426950408889634  # [M]
        l = gl.where(m == float("-inf"), 0.0, 1.0)  # [M]
        if ADD:
            p_acc, exist = _state(partial, strides, b, h, first, rows, M, DV, SIZE, O)
            acc = gl.load(p_acc, mask=exist, other=0.0)  # [M, SIZE]
        else:
            acc = gl.zeros([M, SIZE], gl.float32, O)

        # The first tile of columns: nothing to overlap with.
        visit = visits + VISIT * begin
        left, right = window(visit, row)
        at = (
            column(
                0,
                gl.load(visit + FULL_FROM),
                gl.load(visit + FULL_TO) - gl.load(visit + FULL_FROM),
            )
            * N
        )
        mbarrier.wait(q_ready.index(WG), turn & 1)
        mbarrier.wait(k_ready.index(n % STAGES), n // STAGES & 1)
        b_s = scores(qs, ks, zero, WG * CHUNKS, n % STAGES * CHUNKS, CHUNKS)
        b_s = warpgroup_mma_wait(0, deps=(b_s,))
        mbarrier.arrive(k_free.index(n % STAGES), count=1)
        b_p_new, m, l, alpha = _softmax(
            b_s, m, l, scale, cap, left - at, right - at, columns, True, CAPPED
        )
        b_p = gl.convert_layout(b_p_new.to(qs.dtype), P)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O))[:, None]
        after = n + 1
        mbarrier.wait(k_ready.index(after % STAGES), after // STAGES & 1)

        done = 1
        for v in range(begin, end):
            visit = visits + VISIT * v
            count = gl.load(visit + TILES)
            full_from = gl.load(visit + FULL_FROM)
            full = gl.load(visit + FULL_TO) - full_from
            b_p, acc, m, l = _sweep(
                done, full, n, full_from, full, row, row, bufs, bars, b_p, acc, m, l, scale, cap, columns,
                WG, CHUNKS, STAGES, False, CAPPED,
            )  # fmt: skip
            left, right = window(visit, row)
            b_p, acc, m, l = _sweep(
                gl.maximum(done, full), count, n, full_from, full, left, right, bufs, bars, b_p, acc, m, l, scale, cap, columns,
                WG, CHUNKS, STAGES, True, CAPPED,
            )  # fmt: skip
            n += count
            done = 0

        mbarrier.arrive(q_free.index(WG), count=1)
        turn += 1
        last = n - 1
        mbarrier.wait(v_ready.index(last % STAGES), last // STAGES & 1)
        acc = warpgroup_mma(b_p, matrix(vs.index(last % STAGES)), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(v_free.index(last % STAGES), count=1)

        # Found again, from memory: else the compiler keeps all of this in registers from the start
        # on, and spills.
        tile, b, h = place(_read(drawn, spots), heads, batch_heads, together, tile_count)
        first = gl.load(tiles + 3 * tile) + WG * M
        row = first + gl.arange(0, M, gl.SliceLayout(1, S))
        p_lse = lse + (gl.cast(b, gl.int64) * heads + h) * rows
        l = gl.where(l == 0.0, 1.0, l)  # a row without any key: 0, and -inf
        gl.store(p_lse + row, (m + gl.log2(l)) * 0.6931471805599453, mask=row < rows)
        share = gl.convert_layout(1.0 / l, gl.SliceLayout(1, O))
        p_out, exist = _state(out, strides, b, h, first, rows, M, DV, SIZE, O)
        gl.store(p_out, (acc * share[:, None]).to(out.dtype.element_ty), mask=exist)
        drawn += 1
        index = _drawn(drawn, spots, spot_ready)


@gluon.jit
def _producer(
    descs, lists, sizes, bufs, bars,
    CHUNKS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """K_0, Q, K_1, V_0, K_2, V_1, ...: in the order in which the consumers release the buffers."""
    q_desc, k_desc, v_desc = descs
    tiles, visits, ticket = lists
    qs, ks, vs, spots = bufs
    rows, heads, group, batch_heads, together, tile_count = sizes
    k_ready, k_free, v_ready, v_free, q_ready, q_free, spot_ready = bars
    M: gl.constexpr = qs.shape[2]
    N: gl.constexpr = ks.shape[2]
    W: gl.constexpr = ks.shape[4]
    n = 0
    turn = 0
    at, b_at, h_at = 0, 0, 0
    drawn = 0
    index = _draw(ticket, drawn, spots, spot_ready)
    while index < batch_heads * tile_count:
        tile, b, h = place(index, heads, batch_heads, together, tile_count)
        first = gl.load(tiles + 3 * tile)
        begin = gl.load(tiles + 3 * tile + 1)
        end = gl.load(tiles + 3 * tile + 2)
        for v in range(begin, end):
            visit = visits + VISIT * v
            origin = gl.load(visit + COLUMN_START) + gl.load(visit + FIRST)
            full_from = gl.load(visit + FULL_FROM)
            full = gl.load(visit + FULL_TO) - full_from
            for i in range(gl.load(visit + TILES)):
                slot = n % STAGES
                before, b_before, h_before = at, b_at, h_at
                at, b_at, h_at = origin + column(i, full_from, full) * N, b, h // group
                # A new barrier counts as past phase 1: the first round does not wait.
                mbarrier.wait(k_free.index(slot), n // STAGES & 1 ^ 1)
                mbarrier.expect(k_ready.index(slot), CHUNKS * k_desc.nbytes_per_cta)
                for c in gl.static_range(CHUNKS):
                    tma.async_load(
                        k_desc,
                        [b_at, at, h_at, c * W],
                        k_ready.index(slot),
                        ks.index(slot * CHUNKS + c),
                    )
                if n > 0:
                    into = (n - 1) % STAGES
                    mbarrier.wait(v_free.index(into), (n - 1) // STAGES & 1 ^ 1)
                    mbarrier.expect(v_ready.index(into), v_desc.nbytes_per_cta)
                    tma.async_load(
                        v_desc, [b_before, before, h_before, 0], v_ready.index(into), vs.index(into)
                    )
                if (v == begin) & (i == 0):
                    for wg in gl.static_range(2):
                        mbarrier.wait(q_free.index(wg), turn & 1 ^ 1)
                        mbarrier.expect(q_ready.index(wg), CHUNKS * q_desc.nbytes_per_cta)
                        for c in gl.static_range(CHUNKS):
                            tma.async_load(
                                q_desc,
                                [b, first + wg * M, h, c * W],
                                q_ready.index(wg),
                                qs.index(wg * CHUNKS + c),
                            )
                    turn += 1
                n += 1
        drawn += 1
        index = _draw(ticket, drawn, spots, spot_ready)
    if n > 0:  # the consumers wait for one K tile past the end
        mbarrier.wait(k_free.index(n % STAGES), n // STAGES & 1 ^ 1)
        mbarrier.arrive(k_ready.index(n % STAGES), count=1)
        into = (n - 1) % STAGES
        mbarrier.wait(v_free.index(into), (n - 1) // STAGES & 1 ^ 1)
        mbarrier.expect(v_ready.index(into), v_desc.nbytes_per_cta)
        tma.async_load(v_desc, [b_at, at, h_at, 0], v_ready.index(into), vs.index(into))


@gluon.jit(do_not_specialize=["rows", "heads", "group", "batch_heads", "together", "tile_count"])
def forward(
    q_desc, k_desc, v_desc, partial, out, lse, tiles, visits, counters, strides,
    rows, heads, group, batch_heads, together, tile_count, scale, cap,
    DV: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr,
    ADD: gl.constexpr, CAPPED: gl.constexpr,
):  # fmt: skip
    """Blocks of the descriptors: q [1, 64, 1, W], k [1, N, 1, W], v [1, N, 1, SIZE], CHUNKS x W and
    SIZE at least head_dim and v's. ``strides``: of the first three axes of ``partial`` and of ``out``;
    ``lse`` [batch, heads, rows] in place. ``scale`` turns products into scores in base 2; with
    CAPPED, into multiples of the cap, and ``cap`` is in base 2. ADD: there is a partial.
    ``counters`` int32 [1] is zero: the places drawn. Every tile has work; a persistent grid of any
    size."""
    M: gl.constexpr = q_desc.block_shape[1]
    N: gl.constexpr = k_desc.block_shape[1]
    W: gl.constexpr = k_desc.block_shape[3]
    SIZE: gl.constexpr = v_desc.block_shape[3]
    qs = gl.allocate_shared_memory(q_desc.dtype, [2 * CHUNKS, 1, M, 1, W], q_desc.layout)
    ks = gl.allocate_shared_memory(k_desc.dtype, [STAGES * CHUNKS, 1, N, 1, W], k_desc.layout)
    vs = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, N, 1, SIZE], v_desc.layout)
    spots = gl.allocate_shared_memory(gl.int32, [4, 32], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    spot_ready = mbarrier.allocate_mbarrier(batch=4)
    q_ready = mbarrier.allocate_mbarrier(batch=2)
    q_free = mbarrier.allocate_mbarrier(batch=2)
    k_ready = mbarrier.allocate_mbarrier(batch=STAGES)
    k_free = mbarrier.allocate_mbarrier(batch=STAGES)
    v_ready = mbarrier.allocate_mbarrier(batch=STAGES)
    v_free = mbarrier.allocate_mbarrier(batch=STAGES)
    for wg in gl.static_range(2):
        mbarrier.init(q_ready.index(wg), count=1)
        mbarrier.init(q_free.index(wg), count=1)
    for i in gl.static_range(4):
        mbarrier.init(spot_ready.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)  # both consumers
        mbarrier.init(v_free.index(i), count=2)
    bars = (k_ready, k_free, v_ready, v_free, q_ready, q_free, spot_ready)
    sizes = (rows, heads, group, batch_heads, together, tile_count)
    state = (partial, out, lse, strides)
    lists = (tiles, visits, counters)
    bufs = (qs, ks, vs, spots)
    descs = (q_desc, k_desc, v_desc)
    gl.warp_specialize(
        [
            (_consumer, (state, lists, sizes, scale, cap, bufs, bars, 0, DV, CHUNKS, STAGES, ADD, CAPPED)),
            (_consumer, (state, lists, sizes, scale, cap, bufs, bars, 1, DV, CHUNKS, STAGES, ADD, CAPPED)),
            (_producer, (descs, lists, sizes, bufs, bars, CHUNKS, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
