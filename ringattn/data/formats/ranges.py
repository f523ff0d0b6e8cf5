"""What formats and sources share: parts of files, and records that cannot be read."""

from __future__ import annotations

from dataclasses import dataclass

RANGE_BYTES = 32 << 20


@dataclass(frozen=True)
class FileRange:
    """Bytes ``start`` to ``stop`` of a JSONL file (lines that begin there), rows of a Parquet file
    or dataset, or a whole file (stop None). ``size`` in bytes, or what stands for it."""

    path: str
    start: int
    stop: int | None
    size: int


@dataclass(frozen=True)
class Corrupt:
    """A record that cannot be read."""

    where: str  # file and line, or row
    reason: str
