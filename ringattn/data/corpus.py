"""Text files as documents of byte tokens: one file a document, its bytes and an end token."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ringattn.data.documents import DataError

END = 256  # the token after the last byte of a document (see tokenizer.ByteTokenizer)


@dataclass(frozen=True)
class Corpus:
    """Files with their sizes in bytes, as :class:`ringattn.data.documents.Documents`; nothing is
    kept in memory but the list."""

    root: Path
    names: tuple[str, ...]
    sizes: tuple[int, ...]

    @classmethod
    def open(cls, root: str | None, pattern: str) -> Corpus:
        """All files below ``root`` that match ``pattern`` (see :func:`list_files`)."""
        base, files = list_files(root, pattern)
        names, sizes = zip(*files, strict=True)
        return cls(base, names, sizes)

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64: tokens of every document, the end token included."""
        return np.array(self.sizes, np.int64) + 1

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any file's name or size."""
        listing = "\n".join(f"{n}\t{s}" for n, s in zip(self.names, self.sizes, strict=True))
        return hashlib.sha256(os.fsencode(listing)).hexdigest()[:16]

    def read(self, document: int, start: int, stop: int, step: int = 1) -> np.ndarray:
        """Tokens ``start:stop:step`` of a document, int64; shorter where the document ends.

        Raises DataError if the file has changed.
        """
        size = self.sizes[document]
        wanted = max(0, min(stop, size) - start)
        path = self.root / self.names[document]
        try:
            content = np.fromfile(path, np.uint8, count=wanted, offset=start) if wanted else []
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        if len(content) != wanted:
            raise DataError(f"{path} is shorter than the {size} bytes it had at the start")
        tokens = np.asarray(content[::step], np.int64)
        with_end = start <= size < stop and (size - start) % step == 0
        return np.append(tokens, END) if with_end else tokens


def list_files(root: str | None, pattern: str) -> tuple[Path, list[tuple[str, int]]]:
    """(root, [(name below it, bytes)]): all files below ``root`` (None: this Python's standard
    library) that match ``pattern``.

    Empty files are left out; for the standard library so are installed packages. Raises
    DataError when the root is missing, a file cannot be read, or nothing matches.
    """
    base = Path(root or sysconfig.get_path("stdlib"))
    try:
        base = base.expanduser()
        if not base.is_dir():
            raise DataError(f"data.root={base}: not a directory")
        if root is not None and "**" in pattern:
            _check_readable(base)
        paths = sorted(path for path in base.glob(pattern) if path.is_file())
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"data.root={base}: {error.strerror}") from None
    except (ValueError, NotImplementedError) as error:
        raise DataError(f"data.glob={pattern!r}: {error}") from None
    except RuntimeError as error:  # "~nobody"
        raise DataError(f"data.root={base}: {error}") from None
    if root is None:
        skipped = {"site-packages", "dist-packages", "test", "__pycache__"}
        paths = [path for path in paths if not skipped & set(path.relative_to(base).parts)]
    files = []
    for path in paths:
        try:
            with path.open("rb") as file:
                file.read(1)
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"data.root={base}: cannot read {path}: {error.strerror}") from None
        if size:
            files.append((str(path.relative_to(base)), size))
    if not files:
        raise DataError(f"data.root={base}: no text in files that match data.glob={pattern!r}")
    return base, files


def _check_readable(base: Path) -> None:
    """Raises DataError for a folder that cannot be listed: a glob would pass it over in silence."""

    def refuse(error: OSError) -> None:
        raise DataError(f"data.root={base}: cannot read {error.filename}: {error.strerror}")

    for _ in os.walk(base, onerror=refuse):
        pass
