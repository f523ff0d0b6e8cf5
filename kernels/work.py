"""Work lists: which tiles of columns each tile of rows visits, for all bands of a step.

Rows are queries in the forward and for dq, keys for dk and dv; columns are the other side. A tile
is ``M`` rows of one progression ``first, first + row_step, ...``, so that a dilated mask fills its
tiles too. A visit is one band met by one tile: ``TILES`` tiles of ``N`` columns from column
``FIRST`` on, of which those from ``FULL_FROM`` up to ``FULL_TO`` lie wholly inside of the band and
need no mask arithmetic. Tiles that meet no pair are never listed. Size: tiles + visits, not their
product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ringattn.planning.slices import Band

# The fields of a visit: the band's rows and columns as runs, its edges in elements of these
# (``LO <= column - row <= HI``), and the tiles of columns, FIRST being an element of the run.
ROW_START, ROW_STEP, ROW_COUNT, COLUMN_START, COLUMN_STEP, COLUMN_COUNT, LO, HI = range(8)
FIRST, TILES, FULL_FROM, FULL_TO = range(8, 12)
VISIT = 12


@dataclass(frozen=True)
class Work:
    """``tiles`` int32 [tiles, 3]: first row, its visits from .. to; those with most work first.

    ``visits`` int32 [visits, VISIT], fields as above.
    """

    tiles: np.ndarray
    visits: np.ndarray
    row_step: int
    stepped: bool  # whether any run, or the tiles themselves, step by more than one

    @property
    def columns(self) -> int:
        """Tiles of columns visited, masked ones included: what the launch costs."""
        return int(self.visits[:, TILES].sum())


def work(
    bands: Sequence[Band],
    rows: int,
    m: int,
    n: int,
    transposed: bool,
    everything: bool,
    aligned: bool = False,
) -> Work:
    """The work list for tiles of ``m`` rows and ``n`` columns.

    Args:
        rows: length of the tensor on the row side.
        transposed: rows are keys.
        everything: list every row, also those that no band meets (their results are written too).
        aligned: tiles of columns begin at multiples of ``n`` of the tensor, so that all tiles of
            rows see the same ones; FIRST may then lie before the band's run. Needs runs of step 1.
    """
    table = np.array(
        [(b.q.start, b.q.step, len(b.q), b.k.start, b.k.step, len(b.k), b.lo, b.hi) for b in bands],
        dtype=np.int64,
    ).reshape(-1, 8)
    if transposed:
        table = table[:, [3, 4, 5, 0, 1, 2, 7, 6]]
        table[:, 6:] *= -1
    # Tiles may step like any of the runs; the least work wins, the smallest step among equals.
    steps = [1, *np.unique(table[:, 1][table[:, 1] > 1]).tolist()]
    row_step, (tile, visits) = min(
        ((step, _visits(table, step, rows, m, n, aligned)) for step in steps),
        key=lambda choice: choice[1][1][:, TILES].sum(),
    )
    firsts = _firsts(row_step, rows, m)
    order = np.argsort(tile, kind="stable")  # of one tile, the bands in their order
    tile, visits = tile[order], visits[order]
    ends = np.searchsorted(tile, np.arange(len(firsts) + 1))
    tiles = np.stack([firsts, ends[:-1], ends[1:]], axis=1)
    cost = np.bincount(tile, visits[:, TILES], minlength=len(firsts))
    heavy = np.argsort(-cost, kind="stable")
    if not everything:
        heavy = heavy[: np.count_nonzero(cost)]
    stepped = row_step > 1 or bool((visits[:, [ROW_STEP, COLUMN_STEP]] > 1).any())
    return Work(tiles[heavy].astype(np.int32), visits.astype(np.int32), row_step, stepped)


def _firsts(step: int, rows: int, m: int) -> np.ndarray:
    """First rows of all tiles: residue by residue, ``m`` rows of each at a time."""
    residues = np.arange(min(step, rows))
    counts = _up(_up(rows - residues, step), m)
    block = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(residues, counts) + block * step * m


def _visits(
    table: np.ndarray, step: int, rows: int, m: int, n: int, aligned: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(number of the tile, visit) of every meeting of a band with a tile of rows that step so."""
    common = np.gcd(table[:, 1], step)
    ways = step // common  # residues that the rows of a band fall into
    at, turn = _spread(ways)
    residue = table[at, 0] % common[at] + common[at] * turn
    start, stride, length = table[at, 0], table[at, 1], table[at, 2]
    last = start + (length - 1) * stride
    low = np.maximum(0, _up(start - residue, step)) // m
    high = (last - residue) // step // m
    which, block = _spread(np.maximum(0, high - low + 1))
    block += low[which]
    at, residue = at[which], residue[which]

    run, stride, length, begin, _, columns, lo, hi = table[at].T
    first = residue + block * step * m
    final = np.minimum(first + step * (m - 1), residue + (rows - 1 - residue) // step * step)
    # Elements of the band's rows between the tile's first and last row.
    low = np.maximum(0, _up(first - run, stride))
    high = np.minimum(length - 1, (final - run) // stride)
    j = np.maximum(0, low + lo)
    end = np.minimum(columns - 1, high + hi)
    # The first of them that is in the tile's progression: a band of a few rows may have none.
    ways = step // np.gcd(stride, step)
    own = low + ((residue - run) // (step // ways) * _inverse(stride, step) - low) % ways
    real = (own <= high) & (j <= end)
    if aligned:
        j -= (begin + j) % n
    count = _up(end - j + 1, n)
    # Columns that every row of the tile attends, where the band has all of the tile's rows.
    whole = (step % stride == 0) & (first >= run) & (final <= run + (length - 1) * stride)
    inner, outer = np.maximum(0, high + lo), np.minimum(columns - 1, low + hi)
    full_from, full_to = _up(inner - j, n), (outer + 1 - j) // n
    whole &= full_to > full_from
    full_from, full_to = np.where(whole, full_from, 0), np.where(whole, full_to, 0)

    residues = np.arange(min(step, rows))
    tiles = _up(_up(rows - residues, step), m)
    number = (np.cumsum(tiles) - tiles)[np.minimum(residue, len(residues) - 1)] + block
    visits = np.column_stack([table[at], j, count, full_from, full_to])
    return number[real], visits[real]


def _inverse(stride: np.ndarray, step: int) -> np.ndarray:
    """Of ``stride / c`` modulo ``step / c``, c being their greatest common divisor."""
    strides, which = np.unique(stride, return_inverse=True)
    common = np.gcd(strides, step)
    each = [pow(int(s // c), -1, int(step // c)) for s, c in zip(strides, common, strict=True)]
    return np.array(each, np.int64)[which]


def _up(a: np.ndarray, b: np.ndarray | int) -> np.ndarray:
    """a / b, rounded up."""
    return -(-a // b)


def _spread(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For every i, ``counts[i]`` times i; and 0, 1, ... within each."""
    index = np.repeat(np.arange(len(counts)), counts)
    return index, np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)


@dataclass(frozen=True)
class Chain:
    """Work whose visits add to columns one after the other, in a fixed order.

    ``turns`` int32 [visits, 2]: the number of the visit that adds to the same columns just before
    this one, 0 for none, and this visit's own number, from 1 on. The one before is of an earlier
    tile, or stands earlier in the same one. Visits stand in the order of ``tiles``; what was cut
    from one visit shares its number, the last columns first.
    """

    tiles: np.ndarray
    visits: np.ndarray
    turns: np.ndarray


def chain(keys_work: Work, columns: int, n: int) -> Chain:
    """Orders the sums into tiles of ``n`` columns: of each, by the place of the visit in the list.

    The visits must be aligned. One is cut where the visit before it changes, so that every part
    follows a single one: into as many parts as an end of an earlier visit lies in it and is the
    latest there, two or three in all common masks.
    """
    last = np.zeros(-(-columns // n), np.int32)  # number of the last visit to a tile of columns
    tiles, visits, turns = [], [], []
    own = 0
    for first, begin, end in keys_work.tiles.tolist():
        start = len(visits)
        for visit in keys_work.visits[begin:end]:
            own += 1
            base = int(visit[COLUMN_START] + visit[FIRST]) // n
            latest = last[base : base + int(visit[TILES])]
            cuts = [0, *(np.flatnonzero(latest[1:] != latest[:-1]) + 1).tolist(), len(latest)]
            for a, e in reversed(list(pairwise(cuts))):
                part = visit.copy()
                part[FIRST] += a * n
                part[TILES] = e - a
                for field in (FULL_FROM, FULL_TO):
                    part[field] = min(max(visit[field] - a, 0), e - a)
                visits.append(part)
                turns.append((latest[a], own))
            latest[:] = own
        tiles.append((first, start, len(visits)))
    return Chain(
        np.array(tiles, np.int32).reshape(-1, 3),
        np.array(visits, np.int32).reshape(-1, VISIT),
        np.array(turns, np.int32).reshape(-1, 2),
    )
