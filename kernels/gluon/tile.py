"""What the forward and the backward share: places, visits, and the mask of a tile.

Tiles of tensors ``[batch, tokens, heads, head_dim]`` come by descriptors of all four axes, so any
strides will do and what lies behind a sequence is zero. A head_dim of 96 or 192 is three chunks of
32 or 64 along the contraction.
"""

from ringattn.kernels import work
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

VISIT = gl.constexpr(work.VISIT)
ROW_START = gl.constexpr(work.ROW_START)
ROW_COUNT = gl.constexpr(work.ROW_COUNT)
COLUMN_START = gl.constexpr(work.COLUMN_START)
COLUMN_COUNT = gl.constexpr(work.COLUMN_COUNT)
LO = gl.constexpr(work.LO)
HI = gl.constexpr(work.HI)
FIRST = gl.constexpr(work.FIRST)
TILES = gl.constexpr(work.TILES)
FULL_FROM = gl.constexpr(work.FULL_FROM)
FULL_TO = gl.constexpr(work.FULL_TO)


@gluon.jit
def place(index, heads, batch_heads, together, count):
    """(tile, batch, head) of a place in the order of work. ``together`` heads run side by side; of
    these all ``count`` tiles come before those of the next heads, the heaviest first."""
    section = index // (together * count)
    inside = index - section * together * count
    width = gl.minimum(together, batch_heads - section * together)
    flat = section * together + inside % width
    return inside // width, flat // heads, flat % heads


@gluon.jit
def column(i, full_from, full):
    """The i-th tile of columns in the order of a visit: the ``full`` ones, which need no mask, come
    first, then those before and behind them."""
    after = i - full
    masked = gl.where(after >= full_from, after + full, after)
    return gl.where(i < full, full_from + i, masked)


@gluon.jit
def matrix(x):
    """A tile [1, N, 1, D] in shared memory as [N, D]."""
    return x.reshape([x.shape[1], x.shape[3]])


@gluon.jit
def scores(a, b, zero, first_a, first_b, CHUNKS: gl.constexpr):
    """a b^T, begun: [rows, columns] float32, from CHUNKS parts of head_dim each."""
    s = zero
    for c in gl.static_range(CHUNKS):
        s = warpgroup_mma(
            matrix(a.index(first_a + c)),
            matrix(b.index(first_b + c)).permute((1, 0)),
            s,
            use_acc=c > 0,
            is_async=True,
        )
    return s


@gluon.jit
def window(visit, rows):
    """Per row, the columns that the visit's band allows, counted from its FIRST: (begin, end)."""
    i = rows - gl.load(visit + ROW_START)
    first = gl.load(visit + FIRST)
    begin = gl.maximum(i + gl.load(visit + LO), 0)
    end = gl.minimum(i + gl.load(visit + HI) + 1, gl.load(visit + COLUMN_COUNT))
    exist = (i >= 0) & (i < gl.load(visit + ROW_COUNT))
    return begin - first, gl.where(exist, end - first, begin - first)


@gluon.jit
def _below(x):
    """Bits of those of a thread's columns, less its first one, that are below x; of up to 128."""
    x = gl.minimum(gl.maximum(x, 0), 128)  # a shift by 64 or more is undefined
    number = (x >> 3) * 2 + gl.minimum(x & 7, 2)
    return (gl.full(x.shape, 1, gl.int64, x.type.layout) << number.to(gl.int64)) - 1


@gluon.jit
def inside(begin, end, columns):
    """[rows, columns]: ``begin <= column < end``, of at most 128 columns.

    A thread of a wgmma layout holds columns lane + 0, 1, 8, 9, 16, 17, ... with lane = 0, 2, 4 or
    6. Written like this LLVM finds that ``lane`` is the same for all that a thread holds, so that
    ``bits`` is one number per row, and ``number`` a constant: one instruction per pair.
    """
    lane = (columns & 6)[None, :]
    number = ((columns >> 3) * 2 + (columns & 1))[None, :]
    bits = (_below(end[:, None] - lane) & ~_below(begin[:, None] - lane)).to(gl.int32)
    return (bits >> number) & 1 != 0


@gluon.jit
def tanh(x):
    """Finite for every x: exp2 may overflow to infinity, and 2 / infinity is 0."""
    e = gl.exp2(x * 2.8853900817779268)
    (share,) = gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1 + e], [gl.float32], is_pure=True, pack=1
    )
    return 1 - 2 * share
