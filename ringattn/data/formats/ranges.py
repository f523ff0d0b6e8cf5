"""What formats and sources share: parts of files, and records that cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ringattn.data.documents import DataError

RANGE_BYTES = 32 << 20
RECORD_BYTES = 1000  # of a record that nobody has seen


@dataclass(frozen=True)
class FileRange:
    """Bytes ``start`` to ``stop`` of a JSONL file (lines that begin there), rows of a Parquet file
    or dataset, or a whole file (stop None). ``size`` in bytes, or what stands for it."""

    path: str
    start: int
    stop: int | None
    size: int


def not_text(field: str, value: object) -> str:
    """Why a record is no text."""
    chat = "; chats are for the trainers of docs/trainers.md" if isinstance(value, list) else ""
    return f"{field!r} is {type(value).__name__}, not text{chat}"


@dataclass(frozen=True)
class Corrupt:
    """A record that cannot be read, or where many are lost together, about how many."""

    where: str  # file and line, or row
    reason: str
    records: int = 1


def check_corrupt(corrupt: Sequence[Corrupt], most: int) -> None:
    """Raises DataError, naming the last of too many."""
    lost = 0
    for each in corrupt:
        lost += each.records
        if lost > most:
            which = f"record {lost}" if each.records == 1 else f"records {lost - each.records + 1}"
            which += "" if each.records == 1 else f" to {lost}"
            that = "that is" if each.records == 1 else "these are about"
            raise DataError(
                f"{each.where}: {each.reason}; {that} corrupt {which} (data.max_corrupt={most})"
            )
