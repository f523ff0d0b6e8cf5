"""How documents become rows of equal length: joined and cut, or packed whole by best fit."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

NAMES = ("cut", "best_fit")


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
    rows = np.empty(len(sizes), np.int64)
    rooms: list[int] = []  # how much is left in rows that are not full, each size once, ascending
    open_rows: dict[int, list[int]] = {}
    count = 0
    for i in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[i])
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
    by_row = np.argsort(rows, kind="stable")
    first = np.searchsorted(rows[by_row], np.arange(count + 1))
    return Rows(first, documents[by_row], starts[by_row], sizes[by_row])
