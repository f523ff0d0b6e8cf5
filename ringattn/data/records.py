"""Records of text from files, whatever their format.

A source is listed once as parts of about equal size, so that many processes can read it and the
order of its documents depends on nothing but its files. A record that cannot be read is not lost:
it comes as a :class:`Corrupt`, with its file and line.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ringattn.data.documents import DataError
from ringattn.data.formats import FORMATS
from ringattn.data.formats.ranges import RANGE_BYTES, Corrupt, FileRange
from ringattn.data.listing import list_files


@dataclass(frozen=True)
class Source:
    """Where documents come from: ``data.root``, ``glob``, ``format``, ``field`` and ``split``."""

    root: Path
    format: str
    field: str
    split: str
    parts: tuple[FileRange, ...]

    @classmethod
    def open(
        cls, root: str | None, glob: str, format: str = "auto", field: str = "text",
        split: str = "train",
    ) -> Source:  # fmt: skip
        """Lists a source; raises DataError, naming the key."""
        if root is not None and (folder := _folder(root, format)):
            base = os.path.expanduser(root)
            parts = FORMATS[folder].ranges(base, 0, field, split)
            return cls(Path(base), folder, field, split, tuple(parts))
        base, files = list_files(root, glob)
        if format == "auto":
            kinds = {_format(name) for name, _ in files}
            if len(kinds) > 1:
                raise DataError(
                    f"data.glob={glob!r} matches files of formats {', '.join(sorted(kinds))}; "
                    "give a narrower one, or data.format"
                )
            (format,) = kinds
        ranges = FORMATS[format].ranges
        parts = [part for name, size in files
                 for part in ranges(str(base / name), size, field, split)]  # fmt: skip
        return cls(base, format, field, split, tuple(parts))

    def units(self) -> list[list[FileRange]]:
        """Parts in their order, small ones together: what one process does at a time."""
        units: list[list[FileRange]] = [[]]
        size = 0
        for part in self.parts:
            if units[-1] and size + part.size > RANGE_BYTES:
                units.append([])
                size = 0
            units[-1].append(part)
            size += part.size
        return units

    def texts(self, part: FileRange) -> Iterator[str | Corrupt]:
        """The records of a part in order. Raises DataError if its file is gone."""
        try:
            yield from FORMATS[self.format].texts(part, self.field, self.split)
        except OSError as error:
            raise DataError(f"cannot read {part.path}: {error.strerror or error}") from None


def has_file(root: str, *names: str) -> bool:
    """Whether one of the files is there; no path is an error here."""
    return any(os.path.isfile(os.path.join(os.path.expanduser(root), name)) for name in names)


def _folder(root: str, format: str) -> str | None:
    """The format of which the folder is one dataset as a whole, if it is."""
    for name, each in FORMATS.items():
        if each.MARKS and (format == name or (format == "auto" and has_file(root, *each.MARKS))):
            return name
    return None


def _format(name: str) -> str:
    """By the ending of a file."""
    return next((kind for kind, each in FORMATS.items() if name.endswith(each.ENDINGS)), "text")
