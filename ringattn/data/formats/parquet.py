"""Parquet: a record a row."""

from __future__ import annotations

from collections.abc import Iterator

from ringattn.data.documents import DataError, missing
from ringattn.data.formats.ranges import RECORD_BYTES, Corrupt, FileRange, not_text

ENDINGS = (".parquet",)
MARKS: tuple[str, ...] = ()


def ranges(path: str, size: int, field: str, split: str) -> list[FileRange]:
    try:
        import pyarrow.parquet as pq
        from pyarrow import ArrowException
    except ImportError:
        raise missing("pyarrow", f"data.root: {path}") from None
    try:
        groups = pq.ParquetFile(path).num_row_groups
    except (ArrowException, OSError):
        return [FileRange(path, 0, 0, size)]  # becomes one corrupt record
    return [FileRange(path, g, g + 1, size // groups) for g in range(groups)]


def texts(part: FileRange, field: str, split: str) -> Iterator[str | Corrupt]:
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    file = None
    try:
        file = pq.ParquetFile(part.path)
        first = sum(file.metadata.row_group(g).num_rows for g in range(part.start))
        if field not in file.schema_arrow.names:
            raise DataError(
                f"data.field={field}: {part.path} has columns {', '.join(file.schema_arrow.names)}"
            )
        values = file.read_row_group(part.start, columns=[field]).column(0)
    except (ArrowException, OSError) as error:
        reason = str(error).split(". ")[0]
        if file is None:
            lost = max(1, part.size // RECORD_BYTES)
            said = f"the whole file, {part.size:,} bytes: its rows are not known, some {lost:,}"
        else:
            lost = file.metadata.row_group(part.start).num_rows
            said = f"{lost:,} of {file.metadata.num_rows:,} rows"
        where = f"{part.path}: row group {part.start}"
        yield Corrupt(where, f"not readable ({reason}): {said}", lost)
        return
    for number, value in enumerate(values):
        text = value.as_py()
        ok = isinstance(text, str)
        where = f"{part.path}: row {first + number}"
        yield text if ok else Corrupt(where, not_text(field, text))
