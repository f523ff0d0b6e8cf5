"""The backward kernels: dk and dv of a tile of keys, dq of a tile of queries; what both need.

Each gradient is summed by the one program that owns its rows, in a fixed order: no atomics, the
same bits every time. Scores and their gradients are computed twice for it, seven matrix products
instead of five (Dao 2023, "FlashAttention-2", has the five and atomics).
"""

import triton
import triton.language as tl
from ringattn.kernels.triton.tile import (
    COUNTS,
    FULL_FROM,
    FULL_TO,
    TILES,
    VISIT,
    allowed,
    columns,
    load,
    place,
    product,
    store,
    sum_so_far,
    tanh,
    window,
)


@triton.jit(do_not_specialize=["tokens", "pitch", "heads"])
def prepare(
    dout, out, lse, lse2, delta, dout_strides, out_strides, tokens, pitch, heads,
    D: tl.constexpr, SIZE: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Per query: the log-sum-exp in base 2, and delta = ``sum(dout * out)`` over head_dim; both
    in rows of ``pitch``."""
    blocks = (tokens + M - 1) // M
    pid = tl.program_id(0)
    flat = pid // blocks
    first = pid % blocks * M
    left = tokens - first
    b, h = flat // heads, flat % heads
    b_do, _ = load(dout, dout, dout_strides, b, h, first, 1, left, D, SIZE, 0, M, False, True)
    b_o, _ = load(out, out, out_strides, b, h, first, 1, left, D, SIZE, 0, M, False, True)
    n = tl.arange(0, M)
    b_lse = tl.load(lse + flat.to(tl.int64) * tokens + first + n, mask=n < left, other=0.0)
    at = flat.to(tl.int64) * pitch + first + n
    tl.store(lse2 + at, b_lse * 1.4426950408889634, mask=n < left)
    tl.store(delta + at, tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1), mask=n < left)


@triton.jit(do_not_specialize=[*COUNTS, "pitch"])
def backward_keys(
    q, q2, k, v, dout, dout2, lse2, delta, dk, dv, tiles, visits,
    q_strides, k_strides, v_strides, dout_strides, dk_strides, dv_strides,
    rows, row_step, pitch, heads, group, batch_heads, together, tile_count,
    scale, cap, sm_scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, TMA: tl.constexpr, WS: tl.constexpr,
    STEPPED: tl.constexpr, ADD: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of ``M`` keys; tiles of scores are transposed, ``[keys, queries]``.

    ``heads`` are those of k; the ``group`` query heads of each are walked one after the other.
    ``pitch``: of the rows of lse2 and delta.
    """
    tile, b, h = place(tiles, heads, batch_heads, together, tile_count)
    first = tl.load(tiles + 3 * tile)
    row_step = row_step if STEPPED else 1
    begin = tl.load(tiles + 3 * tile + 1)
    end = tl.load(tiles + 3 * tile + 2)
    left = (rows - first + row_step - 1) // row_step

    b_k, b_k2 = load(k, k, k_strides, b, h, first, row_step, left, D, D1, D2, M, False, True)
    b_v, b_v2 = load(v, v, v_strides, b, h, first, row_step, left, DV, DV1, DV2, M, False, True)
    b_dk, b_dk2 = sum_so_far(
        dk, dk_strides, b, h, first, row_step, left, 1 / sm_scale, D, D1, D2, M, ADD
    )
    b_dv, b_dv2 = sum_so_far(dv, dv_strides, b, h, first, row_step, left, 1.0, DV, DV1, DV2, M, ADD)

    for member in range(group):
        head = h * group + member
        state = (b * heads * group + head).to(tl.int64) * pitch
        for number in range(begin, end):
            visit = visits + VISIT * number
            begins, widths = window(visit, first, row_step, M, STEPPED)
            count = tl.load(visit + TILES)
            full_from = tl.load(visit + FULL_FROM)
            full_to = tl.load(visit + FULL_TO)
            b_dk, b_dk2, b_dv, b_dv2 = _sweep_keys(
                b_k, b_k2, b_v, b_v2, q, q2, dout, dout2, q_strides, dout_strides, lse2 + state,
                delta + state, b, head, b_dk, b_dk2, b_dv, b_dv2,
                visit, begins, widths, full_from, full_to, 0, 0, scale, cap,
                D, D1, D2, DV, DV1, DV2, N, TMA, WS, STEPPED, False, CAPPED, PRECISION,
            )  # fmt: skip
            full = full_to - full_from
            b_dk, b_dk2, b_dv, b_dv2 = _sweep_keys(
                b_k, b_k2, b_v, b_v2, q, q2, dout, dout2, q_strides, dout_strides, lse2 + state,
                delta + state, b, head, b_dk, b_dk2, b_dv, b_dv2,
                visit, begins, widths, 0, count - full, full_from, full, scale, cap,
                D, D1, D2, DV, DV1, DV2, N, TMA, False, STEPPED, True, CAPPED, PRECISION,
            )  # fmt: skip

    store(dk, dk_strides, b, h, first, row_step, left, b_dk, b_dk2, sm_scale, D, D1, D2, M)
    store(dv, dv_strides, b, h, first, row_step, left, b_dv, b_dv2, 1.0, DV, DV1, DV2, M)


@triton.jit
def _sweep_keys(
    b_k, b_k2, b_v, b_v2, q, q2, dout, dout2, q_strides, dout_strides, lse2, delta, b, head,
    b_dk, b_dk2, b_dv, b_dv2, visit, begins, widths, begin, end, jump_at, jump, scale, cap,
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
        b_q, b_q2 = load(q, q2, q_strides, b, head, token, step, left, D, D1, D2, N, TMA, MASK)
        b_lse, b_delta = _prepared(lse2, delta, token, step, left, N, MASK)
        b_s = product(b_k, b_k2, b_q, b_q2, D2, PRECISION)  # [M keys, N queries]
        ok = True
        if MASK:
            ok = allowed(begins, widths, at, N)
        b_p, b_slope = _weights(b_s, b_lse[None, :], ok, scale, cap, MASK, CAPPED)
        b_do, b_do2 = load(
            dout, dout2, dout_strides, b, head, token, step, left, DV, DV1, DV2, N, TMA, MASK
        )
        b_dp = product(b_v, b_v2, b_do, b_do2, DV2, PRECISION)
        b_p_low = b_p.to(b_do.dtype)
        b_dv = tl.dot(b_p_low, b_do, b_dv, input_precision=PRECISION)
        if DV2 > 0:
            b_dv2 = tl.dot(b_p_low, b_do2, b_dv2, input_precision=PRECISION)
        b_ds = (b_slope * (b_dp - b_delta[None, :])).to(b_q.dtype)
        b_dk = tl.dot(b_ds, b_q, b_dk, input_precision=PRECISION)
        if D2 > 0:
            b_dk2 = tl.dot(b_ds, b_q2, b_dk2, input_precision=PRECISION)
    return b_dk, b_dk2, b_dv, b_dv2


@triton.jit(do_not_specialize=[*COUNTS, "pitch"])
def backward_queries(
    q, k, k2, v, v2, dout, lse2, delta, dq, tiles, visits,
    q_strides, k_strides, v_strides, dout_strides, dq_strides,
    rows, row_step, pitch, heads, group, batch_heads, together, tile_count, scale, cap,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, TMA: tl.constexpr, WS: tl.constexpr,
    STEPPED: tl.constexpr, ADD: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of ``M`` queries, without the scale of scores: its last reader applies that."""
    tile, b, h = place(tiles, heads, batch_heads, together, tile_count)
    first = tl.load(tiles + 3 * tile)
    row_step = row_step if STEPPED else 1
    begin = tl.load(tiles + 3 * tile + 1)
    end = tl.load(tiles + 3 * tile + 2)
    left = (rows - first + row_step - 1) // row_step

    b_q, b_q2 = load(q, q, q_strides, b, h, first, row_step, left, D, D1, D2, M, False, True)
    b_do, b_do2 = load(
        dout, dout, dout_strides, b, h, first, row_step, left, DV, DV1, DV2, M, False, True
    )
    state = (b * heads + h).to(tl.int64) * pitch
    b_lse, b_delta = _prepared(lse2 + state, delta + state, first, row_step, left, M, True)
    b_dq, b_dq2 = sum_so_far(dq, dq_strides, b, h, first, row_step, left, 1.0, D, D1, D2, M, ADD)

    for number in range(begin, end):
        visit = visits + VISIT * number
        begins, widths = window(visit, first, row_step, M, STEPPED)
        count = tl.load(visit + TILES)
        full_from = tl.load(visit + FULL_FROM)
        full_to = tl.load(visit + FULL_TO)
        b_dq, b_dq2 = _sweep_queries(
            b_q, b_q2, b_do, b_do2, b_lse, b_delta, k, k2, v, v2, k_strides, v_strides, b, h // group,
            b_dq, b_dq2, visit, begins, widths, full_from, full_to, 0, 0, scale, cap,
            D, D1, D2, DV, DV1, DV2, N, TMA, WS, STEPPED, False, CAPPED, PRECISION,
        )  # fmt: skip
        full = full_to - full_from
        b_dq, b_dq2 = _sweep_queries(
            b_q, b_q2, b_do, b_do2, b_lse, b_delta, k, k2, v, v2, k_strides, v_strides, b, h // group,
            b_dq, b_dq2, visit, begins, widths, 0, count - full, full_from, full, scale, cap,
            D, D1, D2, DV, DV1, DV2, N, TMA, False, STEPPED, True, CAPPED, PRECISION,
        )  # fmt: skip

    store(dq, dq_strides, b, h, first, row_step, left, b_dq, b_dq2, 1.0, D, D1, D2, M)


@triton.jit
def _sweep_queries(
    b_q, b_q2, b_do, b_do2, b_lse, b_delta, k, k2, v, v2, k_strides, v_strides, b, h, b_dq, b_dq2,
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
        b_k, b_k2 = load(k, k2, k_strides, b, h, token, step, left, D, D1, D2, N, TMA, MASK)
        b_v, b_v2 = load(v, v2, v_strides, b, h, token, step, left, DV, DV1, DV2, N, TMA, MASK)
        b_s = product(b_q, b_q2, b_k, b_k2, D2, PRECISION)  # [M queries, N keys]
        b_dp = product(b_do, b_do2, b_v, b_v2, DV2, PRECISION)
        ok = True
        if MASK:
            ok = allowed(begins, widths, at, N)
        _, b_slope = _weights(b_s, b_lse[:, None], ok, scale, cap, MASK, CAPPED)
        b_ds = (b_slope * (b_dp - b_delta[:, None])).to(b_k.dtype)
        b_dq = tl.dot(b_ds, b_k, b_dq, input_precision=PRECISION)
        if D2 > 0:
            b_dq2 = tl.dot(b_ds, b_k2, b_dq2, input_precision=PRECISION)
    return b_dq, b_dq2


@triton.jit
def _prepared(lse2, delta, token, step, left, N: tl.constexpr, MASK: tl.constexpr):
    """What :func:`prepare` wrote, of N queries."""
    n = tl.arange(0, N)
    at = tl.cast(token, tl.int64) + n.to(tl.int64) * step
    if MASK:
        b_lse = tl.load(lse2 + at, mask=n < left, other=0.0)
        b_delta = tl.load(delta + at, mask=n < left, other=0.0)
    else:
        b_lse = tl.load(lse2 + at)
        b_delta = tl.load(delta + at)
    return b_lse, b_delta


@triton.jit
def _weights(b_s, b_lse, ok, scale, cap, MASK: tl.constexpr, CAPPED: tl.constexpr):
    """(the weights of the softmax, their slope by scores over the scale)."""
    if CAPPED:
        bent = tanh(b_s * scale)
        b_p = tl.exp2(bent * cap - b_lse)
    else:
        b_p = tl.exp2(b_s * scale - b_lse)
    if MASK:
        b_p = tl.where(ok, b_p, 0.0)
    b_slope = b_p
    if CAPPED:
        b_slope = b_p * (1 - bent * bent)
    return b_p, b_slope
