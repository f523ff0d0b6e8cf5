"""Text: one file a document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ringattn.data.formats.ranges import Corrupt, FileRange

ENDINGS: tuple[str, ...] = ()  # whatever no other format claims
MARKS: tuple[str, ...] = ()


def ranges(path: str, size: int, field: str, split: str) -> list[FileRange]:
    return [FileRange(path, 0, None, size)]


def texts(part: FileRange, field: str, split: str) -> Iterator[str | Corrupt]:
    content = Path(part.path).read_bytes()
    try:
        yield content.decode()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        yield Corrupt(f"{part.path}:{line}", f"not UTF-8 ({error.reason})")
