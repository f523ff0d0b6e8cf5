"""JSONL, also compressed: a record a line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any

from ringattn.data.formats.ranges import RANGE_BYTES, RECORD_BYTES, Corrupt, FileRange, not_text

ENDINGS = (".json", ".jsonl", ".ndjson", ".jsonl.gz", ".json.gz")
MARKS: tuple[str, ...] = ()


def ranges(path: str, size: int, field: str, split: str) -> list[FileRange]:
    if path.endswith(".gz"):
        return [FileRange(path, 0, None, size)]
    starts = range(0, size, RANGE_BYTES)
    ends = [min(start + RANGE_BYTES, size) for start in starts]
    return [FileRange(path, a, b, b - a) for a, b in zip(starts, ends, strict=True)]


def texts(part: FileRange, field: str, split: str) -> Iterator[str | Corrupt]:
    compressed = part.path.endswith(".gz")
    with gzip.open(part.path) if compressed else open(part.path, "rb") as file:
        if part.start:
            file.seek(part.start - 1)
            file.readline()  # a line belongs to the part that it begins in
        number, at = 0, file.tell()
        before = None
        while part.stop is None or at < part.stop:
            try:
                line = file.readline()
            except (EOFError, zlib.error, OSError) as error:
                if not compressed:
                    raise
                yield _lost(part, number, file, error)
                return
            if not line:
                return
            number, at = number + 1, at + len(line)
            if not line.strip():
                continue
            value = _field(line, field)
            if not isinstance(value, Corrupt):
                yield value
                continue
            if before is None:  # lines are counted only if one has to be named
                before = _lines_before(part)
            yield Corrupt(f"{part.path}:{before + number}", value.reason)


def _lost(part: FileRange, read: int, file: Any, error: Exception) -> Corrupt:
    """What cannot be read of an archive after so many lines, as many as came of its first part."""
    at = min(file.fileobj.tell(), part.size)  # what has been fetched; less has been read
    left = max(part.size - at, 0)
    if isinstance(error, EOFError):
        records = max(1, read)
        what = (
            f"the archive ends in the middle, after {read:,} lines; how much is lost it does not "
            f"say, and counts as {records:,} records"
        )
    else:
        records = max(1, left * read // max(at, 1) if read else left // RECORD_BYTES)
        what = (
            f"damaged archive ({error}): after {read:,} lines about {left:,} of {part.size:,} "
            f"bytes are lost, some {records:,} records"
        )
    return Corrupt(f"{part.path}:{read + 1}", what, records)


def _field(line: bytes, field: str) -> str | Corrupt:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Corrupt("", f"not JSON ({error})")
    if not isinstance(record, dict) or field not in record:
        return Corrupt("", f"no field {field!r}")
    if not isinstance(record[field], str):
        return Corrupt("", not_text(field, record[field]))
    try:
        record[field].encode()
    except UnicodeEncodeError as error:
        return Corrupt("", f"{field!r} is no Unicode text ({error.reason})")
    return record[field]


def _lines_before(part: FileRange) -> int:
    """Lines that begin before the part's first."""
    if not part.start:
        return 0
    count, left = 0, part.start
    with open(part.path, "rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            count += block.count(b"\n")
            left -= len(block)
        file.seek(part.start - 1)
        return count + (file.read(1) != b"\n")
