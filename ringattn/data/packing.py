"""How documents become rows of equal length: joined and cut, or packed whole, by best fit or by the
work of attention."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

NAMES = ("cut", "best_fit", "balanced")


@dataclass(frozen=True)
class Rows:
    """The pieces of documents in every row: row r has pieces ``first[r]`` to ``first[r + 1]``,
    piece i is ``length[i]`` tokens of ``document[i]`` from its token ``start[i]``. int64."""

    first: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray

    @property
    def tokens(self) -> int:
        return int(self.length.sum())


def best_fit(lengths: np.ndarray, seq_len: int, order: np.ndarray) -> Rows:
    """Documents packed whole into rows of ``seq_len``; what is left of a row stays empty.

    Documents longer than a row are first cut into pieces of a row, the rest being one more piece.
    Pieces go, the longest first and equals in ``order``, each into the fullest row that has room
    (best-fit decreasing; for language models: Ding et al. 2024).
    """
    documents, starts, sizes = _pieces(lengths, seq_len, order)
    rows = np.empty(len(sizes), np.int64)
    rooms: list[int] = []  # how much is left in rows that are not full, each size once, ascending
    open_rows: dict[int, list[int]] = {}
    count = 0
    for i, size in enumerate(sizes.tolist()):
        at = bisect_left(rooms, size)
        if at == len(rooms):
            row, room = count, seq_len
            count += 1
        else:
            room = rooms[at]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[at]
        rows[i] = row
        left = room - size
        if left:
            if left not in open_rows:
                insort(rooms, left)
                open_rows[left] = []
            open_rows[left].append(row)
    return _rows(rows, count, documents, starts, sizes)


def balanced(lengths: np.ndarray, seq_len: int, order: np.ndarray) -> Rows:
    """As :func:`best_fit`, into as many rows as that needs or a few more, but each piece goes into
    the row, of those that have room, where attention has least work so far: the squares of its
    pieces (the idea of Wang et al. 2025, "WLB-LLM", arXiv 2503.17924)."""
    documents, starts, sizes = _pieces(lengths, seq_len, order)
    count = len(best_fit(lengths, seq_len, order).first) - 1
    rows, room = np.empty(len(sizes), np.int64), [seq_len] * count
    least = [(0, row) for row in range(count)]  # a heap of (work, row)
    full: list[tuple[int, int, int]] = []  # of those without room for now: (-room, work, row)
    for i, size in enumerate(sizes.tolist()):
        while full and -full[0][0] >= size:
            _, work, row = heappop(full)
            heappush(least, (work, row))
        while least and room[least[0][1]] < size:
            work, row = heappop(least)
            heappush(full, (-room[row], work, row))
        if least:
            work, row = heappop(least)
        else:
            work, row, count = 0, count, count + 1
            room.append(seq_len)
        rows[i] = row
        room[row] -= size
        if room[row]:
            heappush(least, (work + size * size, row))
    return _rows(rows, count, documents, starts, sizes)


def _pieces(
    lengths: np.ndarray, seq_len: int, order: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document, start, length) of every piece, the longest first and equals in ``order``."""
    whole = lengths[order] // seq_len
    rest = lengths[order] % seq_len
    documents = np.concatenate([np.repeat(order, whole), order[rest > 0]])
    starts = (
        np.concatenate(
            [np.arange(whole.sum()) - np.repeat(np.cumsum(whole) - whole, whole), whole[rest > 0]]
        )
        * seq_len
    )
    sizes = np.concatenate([np.full(int(whole.sum()), seq_len), rest[rest > 0]])
    longest = np.argsort(-sizes, kind="stable")
    return documents[longest], starts[longest], sizes[longest]


def _rows(
    rows: np.ndarray, count: int, documents: np.ndarray, starts: np.ndarray, sizes: np.ndarray
) -> Rows:
    by_row = np.argsort(rows, kind="stable")
    first = np.searchsorted(rows[by_row], np.arange(count + 1))
    return Rows(first, documents[by_row], starts[by_row], sizes[by_row])
