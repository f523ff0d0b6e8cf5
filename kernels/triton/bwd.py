"""The backward kernels: dk and dv of a tile of keys, dq of a tile of queries; what both need.

Each gradient is summed by the one program that owns its rows, in a fixed order: no atomics, the
same bits every time. Scores and their gradients are computed twice for it, seven matrix products
instead of five (Dao 2023, "FlashAttention-2", has the five and atomics).
"""

import triton
import triton.language as tl
from ringattn.kernels.triton.tile import (
    COUNTS,
    allowed,
    columns,
    held,
    load,
    place,
    product,
    store,
    tanh,
    window,
)


@triton.jit(do_not_specialize=["tokens", "heads"])
def prepare(
    dout, out, lse, levels, drops, dout_strides, out_strides, tokens, heads,
    D: tl.constexpr, SIZE: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Per query: the log-sum-exp in base 2, and ``sum(dout * out)`` over head_dim."""
    blocks = (tokens + M - 1) // M
    pid = tl.program_id(0)
    flat = pid // blocks
    first = pid % blocks * M
    left = tokens - first
    b, h = flat // heads, flat % heads
    x, _ = load(dout, dout, dout_strides, b, h, first, 1, left, D, SIZE, 0, M, False, True)
    y, _ = load(out, out, out_strides, b, h, first, 1, left, D, SIZE, 0, M, False, True)
    n = tl.arange(0, M)
    at = flat.to(tl.int64) * tokens + first + n
    level = tl.load(lse + at, mask=n < left, other=0.0) * 1.4426950408889634
    tl.store(levels + at, level, mask=n < left)
    tl.store(drops + at, tl.sum(x.to(tl.float32) * y.to(tl.float32), 1), mask=n < left)


@triton.jit(do_not_specialize=[*COUNTS, "queries"])
def backward_keys(
    q, q2, k, v, dout, dout2, levels, drops, dk, dv, tiles, visits,
    q_strides, k_strides, v_strides, dout_strides, dk_strides, dv_strides,
    rows, row_step, queries, heads, group, batch_heads, together, tile_count,
    scale, cap, natural,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, TMA: tl.constexpr, WS: tl.constexpr,
    STEPPED: tl.constexpr, ADD: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of ``M`` keys; tiles of scores are transposed, ``[keys, queries]``.

    ``heads`` are those of k; the ``group`` query heads of each are walked one after the other.
    ``natural`` is the scale of scores.
    """
    tile, b, h = place(tiles, heads, batch_heads, together, tile_count)
    first = tl.load(tiles + 3 * tile)
    row_step = row_step if STEPPED else 1
    begin = tl.load(tiles + 3 * tile + 1)
    end = tl.load(tiles + 3 * tile + 2)
    left = (rows - first + row_step - 1) // row_step

    kt, kt2 = load(k, k, k_strides, b, h, first, row_step, left, D, D1, D2, M, False, True)
    vt, vt2 = load(v, v, v_strides, b, h, first, row_step, left, DV, DV1, DV2, M, False, True)
    sum_k, sum_k2 = held(
        dk, dk_strides, b, h, first, row_step, left, 1 / natural, D, D1, D2, M, ADD
    )
    sum_v, sum_v2 = held(dv, dv_strides, b, h, first, row_step, left, 1.0, DV, DV1, DV2, M, ADD)

    for member in range(group):
        head = h * group + member
        state = (b * heads * group + head).to(tl.int64) * queries
        for number in range(begin, end):
            visit = visits + 12 * number
            begins, widths = window(visit, first, row_step, M, STEPPED)
            count = tl.load(visit + 9)
            full_from = tl.load(visit + 10)
            full_to = tl.load(visit + 11)
            sum_k, sum_k2, sum_v, sum_v2 = _sweep_keys(
                kt, kt2, vt, vt2, q, q2, dout, dout2, q_strides, dout_strides, levels + state,
                drops + state, b, head, sum_k, sum_k2, sum_v, sum_v2,
                visit, begins, widths, full_from, full_to, 0, 0, scale, cap,
                D, D1, D2, DV, DV1, DV2, N, TMA, WS, STEPPED, False, CAPPED, PRECISION,
            )  # fmt: skip
            full = full_to - full_from
            sum_k, sum_k2, sum_v, sum_v2 = _sweep_keys(
                kt, kt2, vt, vt2, q, q2, dout, dout2, q_strides, dout_strides, levels + state,
                drops + state, b, head, sum_k, sum_k2, sum_v, sum_v2,
                visit, begins, widths, 0, count - full, full_from, full, scale, cap,
                D, D1, D2, DV, DV1, DV2, N, TMA, False, STEPPED, True, CAPPED, PRECISION,
            )  # fmt: skip

    store(dk, dk_strides, b, h, first, row_step, left, sum_k, sum_k2, natural, D, D1, D2, M)
    store(dv, dv_strides, b, h, first, row_step, left, sum_v, sum_v2, 1.0, DV, DV1, DV2, M)


@triton.jit
def _sweep_keys(
    kt, kt2, vt, vt2, q, q2, dout, dout2, q_strides, dout_strides, levels, drops, b, head,
    sum_k, sum_k2, sum_v, sum_v2, visit, begins, widths, begin, end, jump_at, jump, scale, cap,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr,
    N: tl.constexpr, TMA: tl.constexpr, WS: tl.constexpr,
    STEPPED: tl.constexpr, MASK: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Query tiles ``begin .. end`` of a visit; those from ``jump_at`` on lie ``jump`` further."""
    origin, step, count = columns(visit, STEPPED)
    # Hoisted address arithmetic would cost the registers that the sums need.
    for t in tl.range(begin, end, warp_specialize=WS, disable_licm=True):
        tile = t
        if MASK:
            tile += tl.where(t >= jump_at, jump, 0)
        at = tile * N
        token = origin + at * step
        left = count - at
        qt, qt2 = load(q, q2, q_strides, b, head, token, step, left, D, D1, D2, N, TMA, MASK)
        level, drop = _prepared(levels, drops, token, step, left, N, MASK)
        s = product(kt, kt2, qt, qt2, D2, PRECISION)
        ok = True
        if MASK:
            ok = allowed(begins, widths, at, N)
        p, slope = _weights(s, level[None, :], ok, scale, cap, MASK, CAPPED)
        gt, gt2 = load(
            dout, dout2, dout_strides, b, head, token, step, left, DV, DV1, DV2, N, TMA, MASK
        )
        dp = product(vt, vt2, gt, gt2, DV2, PRECISION)
        low = p.to(gt.dtype)
        sum_v = tl.dot(low, gt, sum_v, input_precision=PRECISION)
        if DV2 > 0:
            sum_v2 = tl.dot(low, gt2, sum_v2, input_precision=PRECISION)
        ds = (slope * (dp - drop[None, :])).to(qt.dtype)
        sum_k = tl.dot(ds, qt, sum_k, input_precision=PRECISION)
        if D2 > 0:
            sum_k2 = tl.dot(ds, qt2, sum_k2, input_precision=PRECISION)
    return sum_k, sum_k2, sum_v, sum_v2


@triton.jit(do_not_specialize=COUNTS)
def backward_queries(
    q, k, k2, v, v2, dout, levels, drops, dq, tiles, visits,
    q_strides, k_strides, v_strides, dout_strides, dq_strides,
    rows, row_step, heads, group, batch_heads, together, tile_count, scale, cap, natural,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, TMA: tl.constexpr, WS: tl.constexpr,
    STEPPED: tl.constexpr, ADD: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of ``M`` queries."""
    tile, b, h = place(tiles, heads, batch_heads, together, tile_count)
    first = tl.load(tiles + 3 * tile)
    row_step = row_step if STEPPED else 1
    begin = tl.load(tiles + 3 * tile + 1)
    end = tl.load(tiles + 3 * tile + 2)
    left = (rows - first + row_step - 1) // row_step

    qt, qt2 = load(q, q, q_strides, b, h, first, row_step, left, D, D1, D2, M, False, True)
    gt, gt2 = load(
        dout, dout, dout_strides, b, h, first, row_step, left, DV, DV1, DV2, M, False, True
    )
    state = (b * heads + h).to(tl.int64) * rows
    level, drop = _prepared(levels + state, drops + state, first, row_step, left, M, True)
    sum_q, sum_q2 = held(
        dq, dq_strides, b, h, first, row_step, left, 1 / natural, D, D1, D2, M, ADD
    )

    for number in range(begin, end):
        visit = visits + 12 * number
        begins, widths = window(visit, first, row_step, M, STEPPED)
        count = tl.load(visit + 9)
        full_from = tl.load(visit + 10)
        full_to = tl.load(visit + 11)
        sum_q, sum_q2 = _sweep_queries(
            qt, qt2, gt, gt2, level, drop, k, k2, v, v2, k_strides, v_strides, b, h // group,
            sum_q, sum_q2, visit, begins, widths, full_from, full_to, 0, 0, scale, cap,
            D, D1, D2, DV, DV1, DV2, N, TMA, WS, STEPPED, False, CAPPED, PRECISION,
        )  # fmt: skip
        full = full_to - full_from
        sum_q, sum_q2 = _sweep_queries(
            qt, qt2, gt, gt2, level, drop, k, k2, v, v2, k_strides, v_strides, b, h // group,
            sum_q, sum_q2, visit, begins, widths, 0, count - full, full_from, full, scale, cap,
            D, D1, D2, DV, DV1, DV2, N, TMA, False, STEPPED, True, CAPPED, PRECISION,
        )  # fmt: skip

    store(dq, dq_strides, b, h, first, row_step, left, sum_q, sum_q2, natural, D, D1, D2, M)


@triton.jit
def _sweep_queries(
    qt, qt2, gt, gt2, level, drop, k, k2, v, v2, k_strides, v_strides, b, h, sum_q, sum_q2,
    visit, begins, widths, begin, end, jump_at, jump, scale, cap,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr,
    N: tl.constexpr, TMA: tl.constexpr, WS: tl.constexpr,
    STEPPED: tl.constexpr, MASK: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Key tiles ``begin .. end`` of a visit; those from ``jump_at`` on lie ``jump`` further."""
    origin, step, count = columns(visit, STEPPED)
    for t in tl.range(begin, end, warp_specialize=WS):
        tile = t
        if MASK:
            tile += tl.where(t >= jump_at, jump, 0)
        at = tile * N
        token = origin + at * step
        left = count - at
        kt, kt2 = load(k, k2, k_strides, b, h, token, step, left, D, D1, D2, N, TMA, MASK)
        vt, vt2 = load(v, v2, v_strides, b, h, token, step, left, DV, DV1, DV2, N, TMA, MASK)
        s = product(qt, qt2, kt, kt2, D2, PRECISION)
        dp = product(gt, gt2, vt, vt2, DV2, PRECISION)
        ok = True
        if MASK:
            ok = allowed(begins, widths, at, N)
        _, slope = _weights(s, level[:, None], ok, scale, cap, MASK, CAPPED)
        ds = (slope * (dp - drop[:, None])).to(kt.dtype)
        sum_q = tl.dot(ds, kt, sum_q, input_precision=PRECISION)
        if D2 > 0:
            sum_q2 = tl.dot(ds, kt2, sum_q2, input_precision=PRECISION)
    return sum_q, sum_q2


@triton.jit
def _prepared(levels, drops, token, step, left, N: tl.constexpr, MASK: tl.constexpr):
    """What :func:`prepare` wrote, of N queries."""
    n = tl.arange(0, N)
    at = tl.cast(token, tl.int64) + n.to(tl.int64) * step
    if MASK:
        level = tl.load(levels + at, mask=n < left, other=0.0)
        drop = tl.load(drops + at, mask=n < left, other=0.0)
    else:
        level = tl.load(levels + at)
        drop = tl.load(drops + at)
    return level, drop


@triton.jit
def _weights(s, level, ok, scale, cap, MASK: tl.constexpr, CAPPED: tl.constexpr):
    """(the weights of the softmax, their slope by scores over the scale)."""
    if CAPPED:
        bent = tanh(s * scale)
        p = tl.exp2(bent * cap - level)
    else:
        p = tl.exp2(s * scale - level)
    if MASK:
        p = tl.where(ok, p, 0.0)
    slope = p
    if CAPPED:
        slope = p * (1 - bent * bent)
    return p, slope
