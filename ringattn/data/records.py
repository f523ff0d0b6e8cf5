"""Records of text from files: text, JSONL (also .gz), Parquet, datasets saved on disk.

A source is listed once as pieces of about equal size, so that many processes can read it and the
order of its documents depends on nothing but its files. A record that cannot be read is not lost:
it comes as a :class:`Corrupt`, with its file and line.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ringattn.data.corpus import list_files
from ringattn.data.documents import DataError, missing

FORMATS = ("text", "jsonl", "parquet", "datasets")
ENDINGS = {
    ".json": "jsonl", ".jsonl": "jsonl", ".ndjson": "jsonl", ".jsonl.gz": "jsonl",
    ".json.gz": "jsonl", ".parquet": "parquet",
}  # fmt: skip
PIECE_BYTES = 32 << 20
PIECE_ROWS = 20_000


@dataclass(frozen=True)
class Piece:
    """Bytes ``start`` to ``stop`` of a JSONL file (lines that begin there), rows of a Parquet file
    or dataset, or a whole file (stop None). ``size`` in bytes, or what stands for it."""

    path: str
    start: int
    stop: int | None
    size: int


@dataclass(frozen=True)
class Corrupt:
    where: str  # file and line, or row
    reason: str


@dataclass(frozen=True)
class Source:
    """Where documents come from: ``data.root``, ``glob``, ``format``, ``field`` and ``split``."""

    root: Path
    format: str
    field: str
    split: str
    pieces: tuple[Piece, ...]

    @classmethod
    def open(
        cls, root: str | None, glob: str, format: str = "auto", field: str = "text",
        split: str = "train",
    ) -> Source:  # fmt: skip
        """Lists a source; raises DataError, naming the key."""
        saved = root is not None and has_file(root, "state.json", "dataset_dict.json")
        if root is not None and (format == "datasets" or (format == "auto" and saved)):
            base = Path(os.path.expanduser(root))
            return cls(base, "datasets", field, split, _dataset_pieces(base, field, split))
        base, files = list_files(root, glob)
        if format == "auto":
            kinds = {_format(name) for name, _ in files}
            if len(kinds) > 1:
                raise DataError(
                    f"data.glob={glob!r} matches files of formats {', '.join(sorted(kinds))}; "
                    "give a narrower one, or data.format"
                )
            (format,) = kinds
        pieces: list[Piece] = []
        for name, size in files:
            path = str(base / name)
            if format == "jsonl" and not name.endswith(".gz"):
                starts = range(0, size, PIECE_BYTES)
                ends = [min(s + PIECE_BYTES, size) for s in starts]
                pieces += [Piece(path, s, e, e - s) for s, e in zip(starts, ends, strict=True)]
            elif format == "parquet":
                pieces += _parquet_pieces(path, size)
            else:
                pieces.append(Piece(path, 0, None, size))
        return cls(base, format, field, split, tuple(pieces))

    def units(self) -> list[list[Piece]]:
        """Pieces in their order, small ones together: what one process does at a time."""
        units: list[list[Piece]] = [[]]
        size = 0
        for piece in self.pieces:
            if units[-1] and size + piece.size > PIECE_BYTES:
                units.append([])
                size = 0
            units[-1].append(piece)
            size += piece.size
        return units

    def texts(self, piece: Piece) -> Iterator[str | Corrupt]:
        """The records of a piece in order. Raises DataError if its file is gone."""
        try:
            if self.format == "text":
                yield _text_file(piece)
            elif self.format == "jsonl":
                yield from _json_lines(piece, self.field)
            elif self.format == "parquet":
                yield from _parquet_rows(piece, self.field)
            else:
                yield from _dataset_rows(piece, self.field, self.split)
        except OSError as error:
            raise DataError(f"cannot read {piece.path}: {error.strerror or error}") from None


def has_file(root: str, *names: str) -> bool:
    """Whether one of the files is there; no path is an error here."""
    return any(os.path.isfile(os.path.join(os.path.expanduser(root), name)) for name in names)


def _format(name: str) -> str:
    return next((kind for end, kind in ENDINGS.items() if name.endswith(end)), "text")


def _text_file(piece: Piece) -> str | Corrupt:
    content = Path(piece.path).read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        return Corrupt(f"{piece.path}:{line}", f"not UTF-8 ({error.reason})")


def _json_lines(piece: Piece, field: str) -> Iterator[str | Corrupt]:
    compressed = piece.path.endswith(".gz")
    with gzip.open(piece.path) if compressed else open(piece.path, "rb") as file:
        if piece.start:
            file.seek(piece.start - 1)
            file.readline()  # a line belongs to the piece that it begins in
        number, at = 0, file.tell()
        before = None
        while piece.stop is None or at < piece.stop:
            try:
                line = file.readline()
            except (EOFError, zlib.error, OSError) as error:
                if not compressed:
                    raise
                yield Corrupt(f"{piece.path}:{number + 1}", f"damaged archive ({error})")
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
                before = _lines_before(piece)
            yield Corrupt(f"{piece.path}:{before + number}", value.reason)


def _field(line: bytes, field: str) -> str | Corrupt:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Corrupt("", f"not JSON ({error})")
    if not isinstance(record, dict) or field not in record:
        return Corrupt("", f"no field {field!r}")
    if not isinstance(record[field], str):
        return Corrupt("", f"{field!r} is {type(record[field]).__name__}, not text")
    try:
        record[field].encode()
    except UnicodeEncodeError as error:
        return Corrupt("", f"{field!r} is no Unicode text ({error.reason})")
    return record[field]


def _lines_before(piece: Piece) -> int:
    """Lines that begin before the piece's first."""
    if not piece.start:
        return 0
    count, left = 0, piece.start
    with open(piece.path, "rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            count += block.count(b"\n")
            left -= len(block)
        file.seek(piece.start - 1)
        return count + (file.read(1) != b"\n")


def _parquet_pieces(path: str, size: int) -> list[Piece]:
    try:
        import pyarrow.parquet as pq
        from pyarrow import ArrowException
    except ImportError:
        raise missing("pyarrow", f"data.root: {path}") from None
    try:
        groups = pq.ParquetFile(path).num_row_groups
    except (ArrowException, OSError):
        return [Piece(path, 0, 0, size)]  # becomes one corrupt record
    return [Piece(path, g, g + 1, size // groups) for g in range(groups)]


def _parquet_rows(piece: Piece, field: str) -> Iterator[str | Corrupt]:
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    try:
        file = pq.ParquetFile(piece.path)
        first = sum(file.metadata.row_group(g).num_rows for g in range(piece.start))
        if field not in file.schema_arrow.names:
            raise DataError(
                f"data.field={field}: {piece.path} has columns {', '.join(file.schema_arrow.names)}"
            )
        values = file.read_row_group(piece.start, columns=[field]).column(0)
    except (ArrowException, OSError) as error:
        reason = str(error).split(". ")[0]
        yield Corrupt(f"{piece.path}: row group {piece.start}", f"not readable ({reason})")
        return
    for number, value in enumerate(values):
        text = value.as_py()
        ok = isinstance(text, str)
        where = f"{piece.path}: row {first + number}"
        yield text if ok else Corrupt(where, f"{field!r} is {type(text).__name__}, not text")


def _dataset(root: Path, split: str):
    try:
        import datasets
    except ImportError:
        raise missing("datasets", f"data.root={root}") from None
    try:
        loaded = datasets.load_from_disk(str(root))
    except (OSError, ValueError) as error:
        raise DataError(f"data.root={root}: not a dataset saved on disk: {error}") from None
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(f"data.split={split}: {root} has {', '.join(loaded)}")
        return loaded[split]
    return loaded


def _dataset_pieces(root: Path, field: str, split: str) -> tuple[Piece, ...]:
    data = _dataset(root, split)
    if field not in data.column_names:
        raise DataError(f"data.field={field}: {root} has columns {', '.join(data.column_names)}")
    starts = range(0, len(data), PIECE_ROWS)
    return tuple(Piece(str(root), s, min(s + PIECE_ROWS, len(data)), PIECE_BYTES) for s in starts)


def _dataset_rows(piece: Piece, field: str, split: str) -> Iterator[str | Corrupt]:
    data = _dataset(Path(piece.path), split).select_columns([field])
    for number in range(piece.start, piece.stop):
        text = data[number][field]
        where = f"{piece.path}: row {number}"
        ok = isinstance(text, str)
        yield text if ok else Corrupt(where, f"{field!r} is {type(text).__name__}, not text")
