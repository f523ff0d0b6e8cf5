"""What the forward and the backward kernels share: places, loads, and the mask of a tile.

A tile of a tensor ``[batch, tokens, heads, head_dim]`` is some tokens of one head. Its head_dim is
held as one or two powers of two (96 = 64 + 32): ``D`` is the true size, ``D1`` and ``D2`` what is
held, ``D2`` = 0 for none; ``D1`` or ``D1 + D2`` may exceed ``D`` and is then filled with zeros.
"""

import triton
import triton.language as tl
from ringattn.kernels import work

VISIT = tl.constexpr(work.VISIT)
ROW_START = tl.constexpr(work.ROW_START)
ROW_STEP = tl.constexpr(work.ROW_STEP)
ROW_COUNT = tl.constexpr(work.ROW_COUNT)
COLUMN_START = tl.constexpr(work.COLUMN_START)
COLUMN_STEP = tl.constexpr(work.COLUMN_STEP)
COLUMN_COUNT = tl.constexpr(work.COLUMN_COUNT)
LO = tl.constexpr(work.LO)
HI = tl.constexpr(work.HI)
FIRST = tl.constexpr(work.FIRST)
TILES = tl.constexpr(work.TILES)
FULL_FROM = tl.constexpr(work.FULL_FROM)
FULL_TO = tl.constexpr(work.FULL_TO)
# Numbers that differ from step to step: Triton would compile anew for those that are 1 or a
# multiple of 16.
COUNTS = ["rows", "row_step", "heads", "group", "batch_heads", "together", "tile_count"]


@triton.jit
def place(tiles, heads, batch_heads, together, count):
    """(tile, batch, head) of this program. ``together`` heads share the L2 cache; of
    these all tiles come before those of the next heads, the heaviest first."""
    pid = tl.program_id(0)
    section = pid // (together * count)
    inside = pid - section * together * count
    width = tl.minimum(together, batch_heads - section * together)
    flat = section * together + inside % width
    return inside // width, flat // heads, flat % heads


@triton.jit
def start(x, strides, b, h, token):
    """Where a token of one head begins; offsets are 64 bit."""
    b, h, token = b.to(tl.int64), h.to(tl.int64), tl.cast(token, tl.int64)
    return x + b * strides[0] + h * strides[2] + token * strides[1]


@triton.jit
def load(
    x, x2, strides, b, h, token, step, left,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, N: tl.constexpr,
    TMA: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Tokens ``token, token + step, ...`` as two halves ``[N, D1]``, ``[N, D2]``.

    x and x2 are pointers or, with TMA, descriptors over [batch, heads, tokens, head_dim]. With
    MASK only ``left`` tokens exist (a descriptor knows the length itself); the others are 0.
    """
    if TMA:
        b_x = x.load([b, h, token, 0]).reshape(N, D1)
        b_x2 = b_x
        if D2 > 0:
            b_x2 = x2.load([b, h, token, D1]).reshape(N, D2)
    else:
        n = tl.arange(0, N)
        base = start(x, strides, b, h, token)
        p_x = base + (n.to(tl.int64) * step * strides[1])[:, None]
        b_x = _columns(p_x, (n < left)[:, None], 0, D, D1, MASK)
        b_x2 = b_x
        if D2 > 0:
            b_x2 = _columns(p_x, (n < left)[:, None], D1, D, D2, MASK)
    return b_x, b_x2


@triton.jit
def _columns(p_x, exist, begin, D: tl.constexpr, SIZE: tl.constexpr, MASK: tl.constexpr):
    d = begin + tl.arange(0, SIZE)[None, :]
    if begin + SIZE > D:
        return tl.load(p_x + d, mask=exist & (d < D), other=0.0)
    if MASK:
        return tl.load(p_x + d, mask=exist, other=0.0)
    return tl.load(p_x + d)


@triton.jit
def sum_so_far(
    x, strides, b, h, first, step, left, factor,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, M: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Where a float32 sum begins: with ADD at what x holds, times ``factor``, else at 0."""
    if ADD:
        b_x, b_x2 = load(x, x, strides, b, h, first, step, left, D, D1, D2, M, False, True)
        b_x *= factor
        if D2 > 0:
            b_x2 *= factor
    else:
        b_x = tl.zeros([M, D1], tl.float32)
        b_x2 = b_x
        if D2 > 0:
            b_x2 = tl.zeros([M, D2], tl.float32)
    return b_x, b_x2


@triton.jit
def store(
    x, strides, b, h, first, step, left, b_x, b_x2, factor,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Writes two halves, times ``factor``, in the dtype of x."""
    m = tl.arange(0, M)
    p_x = start(x, strides, b, h, first) + (m.to(tl.int64) * step * strides[1])[:, None]
    exist = (m < left)[:, None]
    d = tl.arange(0, D1)[None, :]
    tl.store(p_x + d, (b_x * factor).to(x.dtype.element_ty), mask=exist & (d < D))
    if D2 > 0:
        d2 = D1 + tl.arange(0, D2)[None, :]
        tl.store(p_x + d2, (b_x2 * factor).to(x.dtype.element_ty), mask=exist & (d2 < D))


@triton.jit
def product(a, a2, b, b2, D2: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T over both halves, float32."""
    c = tl.dot(a, b.T, input_precision=PRECISION)
    if D2 > 0:
        c = tl.dot(a2, b2.T, c, input_precision=PRECISION)
    return c


@triton.jit
def window(visit, first, row_step, M: tl.constexpr, STEPPED: tl.constexpr):
    """Per row of the tile, the columns that the visit's band allows, counted from the visit's first
    one: (the first, how many)."""
    start = tl.load(visit + ROW_START)
    if STEPPED:
        step = tl.load(visit + ROW_STEP)
        apart = first + tl.arange(0, M).to(tl.int64) * row_step - start
        element = apart // step
        exist = (apart >= 0) & (element * step == apart)
        i = tl.where(exist, element, -1).to(tl.int32)
    else:
        i = first - start + tl.arange(0, M)
    begin = i + tl.load(visit + LO)
    end = tl.minimum(i + tl.load(visit + HI), tl.load(visit + COLUMN_COUNT) - 1) + 1
    exist = (i >= 0) & (i < tl.load(visit + ROW_COUNT))
    return begin - tl.load(visit + FIRST), tl.where(exist, tl.maximum(end - begin, 0), 0)


@triton.jit
def columns(visit, STEPPED: tl.constexpr):
    """(token of the visit's first column, step of the tokens, columns from there on)."""
    j = tl.load(visit + FIRST)
    step = tl.load(visit + COLUMN_STEP) if STEPPED else 1
    return tl.load(visit + COLUMN_START) + j * step, step, tl.load(visit + COLUMN_COUNT) - j


@triton.jit
def allowed(begin, width, at, N: tl.constexpr):
    """[M, N]: the pairs of a window among columns at, at + 1, ... One unsigned comparison each."""
    after = (at + tl.arange(0, N))[None, :] - begin[:, None]
    return after.to(tl.uint32, bitcast=True) < width[:, None].to(tl.uint32, bitcast=True)


@triton.jit
def tanh(x):
    """Finite for every x: exp2 may overflow to infinity, and 2 / infinity is 0."""
    return 1 - 2 / (1 + tl.exp2(x * 2.8853900817779268))
