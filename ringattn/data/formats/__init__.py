"""Formats of data files. To add one: its file, and its line in ``FORMATS``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from ringattn.data.formats import jsonl, parquet, saved, text
from ringattn.data.formats.ranges import Corrupt, FileRange


class Format(Protocol):
    """A module of this package. ``ENDINGS`` are those of its files, ``MARKS`` the files that a
    folder has which is one dataset as a whole."""

    ENDINGS: tuple[str, ...]
    MARKS: tuple[str, ...]

    def ranges(self, path: str, size: int, field: str, split: str) -> list[FileRange]:
        """A file, or a marked folder, as parts of about equal size, in order. Raises DataError."""

    def texts(self, part: FileRange, field: str, split: str) -> Iterator[str | Corrupt]:
        """The records of a part in order. Raises DataError, or OSError of its file."""


FORMATS: dict[str, Format] = {"text": text, "jsonl": jsonl, "parquet": parquet, "datasets": saved}
