"""Datasets saved on disk by Hugging Face's datasets: a record a row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ringattn.data.documents import DataError, missing
from ringattn.data.formats.ranges import RANGE_BYTES, Corrupt, FileRange, not_text

ENDINGS: tuple[str, ...] = ()
MARKS = ("state.json", "dataset_dict.json")
ROWS = 20_000  # of a part


def ranges(path: str, size: int, field: str, split: str) -> list[FileRange]:
    data = _dataset(Path(path), split)
    if field not in data.column_names:
        raise DataError(f"data.field={field}: {path} has columns {', '.join(data.column_names)}")
    starts = range(0, len(data), ROWS)
    return [FileRange(path, s, min(s + ROWS, len(data)), RANGE_BYTES) for s in starts]


def texts(part: FileRange, field: str, split: str) -> Iterator[str | Corrupt]:
    data = _dataset(Path(part.path), split).select_columns([field])
    for number in range(part.start, part.stop):
        text = data[number][field]
        where = f"{part.path}: row {number}"
        ok = isinstance(text, str)
        yield text if ok else Corrupt(where, not_text(field, text))


def _dataset(root: Path, split: str) -> Any:
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
