"""The forward kernel: one tile of queries, all bands of a step, online softmax in base 2.

The online softmax begins where the steps before have ended: their log-sum-exp is the first maximum,
of weight 1, their output the first accumulator. So a merge costs no pass of its own and nothing is
rounded between steps. After Dao 2023, "FlashAttention-2"; OVERLAP after Shah et al. 2024,
"FlashAttention-3".
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


@triton.jit(do_not_specialize=COUNTS)
def forward(
    q, k, k2, v, v2, partial, out, lse, tiles, visits,
    q_strides, k_strides, v_strides, partial_strides, out_strides,
    rows, row_step, heads, group, batch_heads, together, tile_count, scale, cap,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, TMA: tl.constexpr, OVERLAP: tl.constexpr, WS: tl.constexpr,
    STEPPED: tl.constexpr, ADD: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``scale`` turns products into scores in base 2; with CAPPED, into multiples of the cap, and
    ``cap`` is in base 2. ADD: there is a partial."""
    tile, b, h = place(tiles, heads, batch_heads, together, tile_count)
    first = tl.load(tiles + 3 * tile)
    row_step = row_step if STEPPED else 1
    begin = tl.load(tiles + 3 * tile + 1)
    end = tl.load(tiles + 3 * tile + 2)
    left = (rows - first + row_step - 1) // row_step

    b_q, b_q2 = load(q, q, q_strides, b, h, first, row_step, left, D, D1, D2, M, False, True)
    exist = tl.arange(0, M) < left
    p_lse = lse + (b * heads + h).to(tl.int64) * rows + first
    p_lse += tl.arange(0, M).to(tl.int64) * row_step
    m = tl.load(p_lse, mask=exist, other=float("-inf")) * 1.4426950408889634  # [M]
    l = tl.where(m == float("-inf"), 0.0, 1.0)  # [M]
    acc, acc2 = sum_so_far(
        partial, partial_strides, b, h, first, row_step, left, 1.0, DV, DV1, DV2, M, ADD
    )

    for number in range(begin, end):
        visit = visits + VISIT * number
        begins, widths = window(visit, first, row_step, M, STEPPED)
        count = tl.load(visit + TILES)
        full_from = tl.load(visit + FULL_FROM)
        full_to = tl.load(visit + FULL_TO)
        full = full_to - full_from
        if full > 0:
            m, l, acc, acc2 = _sweep(
                b_q, b_q2, k, k2, v, v2, k_strides, v_strides, b, h // group, m, l, acc, acc2,
                visit, begins, widths, full_from, full_to, 0, 0, scale, cap,
                D, D1, D2, DV, DV1, DV2, N, TMA, OVERLAP, WS, STEPPED, False, CAPPED, PRECISION,
            )  # fmt: skip
        m, l, acc, acc2 = _sweep(
            b_q, b_q2, k, k2, v, v2, k_strides, v_strides, b, h // group, m, l, acc, acc2,
            visit, begins, widths, 0, count - full, full_from, full, scale, cap,
            D, D1, D2, DV, DV1, DV2, N, TMA, False, False, STEPPED, True, CAPPED, PRECISION,
        )  # fmt: skip

    l = tl.where(l == 0, 1.0, l)  # a row without any key: 0, and -inf
    if begin < end:  # without a visit the log-sum-exp stays, to the bit
        tl.store(p_lse, (m + tl.log2(l)) * 0.6931471805599453, mask=exist)
    share = (1 / l)[:, None]
    store(out, out_strides, b, h, first, row_step, left, acc, acc2, share, DV, DV1, DV2, M)


@triton.jit
def _sweep(
    b_q, b_q2, k, k2, v, v2, k_strides, v_strides, b, h, m, l, acc, acc2,
    visit, begins, widths, begin, end, jump_at, jump, scale, cap,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr,
    N: tl.constexpr, TMA: tl.constexpr, OVERLAP: tl.constexpr, WS: tl.constexpr,
    STEPPED: tl.constexpr, MASK: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Column tiles ``begin .. end`` of a visit; those from ``jump_at`` on lie ``jump`` further.

    With OVERLAP the scores of the next tile are computed while the softmax of this one runs; there
    must be a tile.
    """
    origin, step, count = columns(visit, STEPPED)
    if OVERLAP:
        b_s = _scores(
            b_q, b_q2, k, k2, k_strides, b, h, origin, step, count, begin * N,
            D, D1, D2, N, TMA, MASK, PRECISION,
        )  # fmt: skip
    for t in tl.range(begin, end, warp_specialize=WS):
        tile = t
        if MASK:
            tile += tl.where(t >= jump_at, jump, 0)
        at = tile * N
        following = tl.minimum(t + 1, end - 1) * N if OVERLAP else at
        b_s_next = _scores(
            b_q, b_q2, k, k2, k_strides, b, h, origin, step, count, following,
            D, D1, D2, N, TMA, MASK, PRECISION,
        )  # fmt: skip
        if not OVERLAP:
            b_s = b_s_next
        if CAPPED:
            b_s = tanh(b_s * scale) * cap
        if MASK:
            if not CAPPED:
                b_s *= scale
            b_s = tl.where(allowed(begins, widths, at, N), b_s, float("-inf"))
            m_new = tl.maximum(m, tl.max(b_s, 1))
            # Rows without a key so far: 0 in place of -inf keeps exp2 free of NaN.
            level = tl.where(m_new == float("-inf"), 0.0, m_new)
            b_p = tl.exp2(b_s - level[:, None])
            alpha = tl.exp2(m - level)
        elif CAPPED:
            m_new = tl.maximum(m, tl.max(b_s, 1))
            b_p = tl.exp2(b_s - m_new[:, None])
            alpha = tl.exp2(m - m_new)
        else:
            # The scale rides along in one fused multiply-add per element.
            m_new = tl.maximum(m, tl.max(b_s, 1) * scale)
            b_p = tl.exp2(b_s * scale - m_new[:, None])
            alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(b_p, 1)
        m = m_new
        b_v, b_v2 = load(
            v, v2, v_strides, b, h, origin + at * step, step, count - at, DV, DV1, DV2, N, TMA, MASK
        )
        b_p = b_p.to(b_v.dtype)
        acc = tl.dot(b_p, b_v, acc * alpha[:, None], input_precision=PRECISION)
        if DV2 > 0:
            acc2 = tl.dot(b_p, b_v2, acc2 * alpha[:, None], input_precision=PRECISION)
        if OVERLAP:
            b_s = b_s_next
    return m, l, acc, acc2


@triton.jit
def _scores(
    b_q, b_q2, k, k2, strides, b, h, origin, step, count, at,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, N: tl.constexpr,
    TMA: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b_k, b_k2 = load(
        k, k2, strides, b, h, origin + at * step, step, count - at, D, D1, D2, N, TMA, MASK
    )
    return product(b_q, b_q2, b_k, b_k2, D2, PRECISION)  # [M, N]
