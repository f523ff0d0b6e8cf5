"""Cuts a band into full rectangles and small masked remainders, so that a fused kernel which
knows only "full" and "small mask" does nearly all of the arithmetic without an L x L mask.

A triangle of size m is one rectangle of m/2 x m/2 and two triangles of half the size; equal
pieces along a diagonal form one batch, so a triangle takes O(log m) kernel calls.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

# Rows of the smallest piece, chosen with benchmarks/tiles.py: smaller ones waste less arithmetic
# on masked pairs, larger ones merge fewer times.
TILE = 64


@dataclass(frozen=True, slots=True)
class Piece:
    """``count`` rectangles of ``rows`` x ``keys``; each next one lies ``stride`` further on both
    axes. Inside a rectangle pair (i, j) exists iff ``lo <= j - i <= hi`` (``None``: open).
    Every row has at least one key.
    """

    q: int
    k: int
    rows: int
    keys: int
    count: int = 1
    stride: int = 0
    lo: int | None = None
    hi: int | None = None


def cut(n_q: int, n_k: int, lo: int, hi: int, tile: int = TILE) -> Iterator[Piece]:
    """The pieces of ``{(i, j): lo <= j - i <= hi}``, i < n_q, j < n_k; every pair exactly once."""
    first, last = max(0, -hi), min(n_q, n_k - lo)  # rows with at least one key
    lefts, rights = max(first, -lo), min(last, n_k - hi)
    # Rows from `lefts` on have a left edge; rows before `rights` have a right edge.
    marks = sorted({first, last, min(max(lefts, first), last), min(max(rights, first), last)})
    for a, e in pairwise(marks):
        left, right = a >= lefts, a < rights
        if left and right:
            yield from _band(a, e - a, lo, hi, tile)
            continue
        # One open side: a rectangle beside a triangle.
        start = e + lo if left else 0
        stop = a + hi if right else n_k
        if stop > start:
            yield Piece(a, start, e - a, stop - start)
        if left:
            yield from _triangles(a, a + lo, e - a, 1, False, tile)
        if right:
            yield from _triangles(a, a + hi, e - a, 1, True, tile)


def _band(a: int, rows: int, lo: int, hi: int, tile: int) -> Iterator[Piece]:
    """``rows`` rows from ``a`` on, each with the whole band: blocks along the diagonal."""
    width = hi - lo + 1
    if width < 2 * tile:
        block = min(tile, rows)
        for q, size, count in _blocks(a, rows, block):
            keys = size + width - 1
            yield Piece(q, q + lo, size, keys, count, size, 0, width - 1)
        return
    block = tile
    while 4 * block <= width and 2 * block <= rows:
        block *= 2
    for q, size, count in _blocks(a, rows, block):
        yield from _triangles(q, q + lo, size, count, False, tile)
        if width - 1 > size:
            yield Piece(q, q + lo + size, size, width - 1 - size, count, size)
        yield from _triangles(q, q + hi, size, count, True, tile)


def _blocks(a: int, rows: int, block: int) -> Iterator[tuple[int, int, int]]:
    """(first row, rows per block, count): equal blocks, then the rest."""
    count, rest = divmod(rows, block)
    if count:
        yield a, block, count
    if rest:
        yield a + count * block, rest, 1


def _triangles(q: int, k: int, size: int, count: int, lower: bool, tile: int) -> Iterator[Piece]:
    """``count`` adjacent triangles: ``j <= i`` (lower) or ``j >= i`` of ``size`` rows each."""
    halvings = max(0, (size // tile).bit_length() - 1)
    rest = size % 2**halvings
    if rest and count > 1:
        for i in range(count):
            yield from _triangles(q + i * size, k + i * size, size, 1, lower, tile)
        return
    size -= rest
    if rest:
        beside = Piece(q + size, k, rest, size) if lower else Piece(q, k + size, size, rest)
        yield beside
        yield from _triangles(q + size, k + size, rest, 1, lower, tile)
    for _ in range(halvings):
        half = size // 2
        row, col = (q + half, k) if lower else (q, k + half)
        yield Piece(row, col, half, half, count, size)
        size, count = half, 2 * count
    open_side = (None, 0) if lower else (0, None)
    yield Piece(q, k, size, size, count, size, *open_side)
