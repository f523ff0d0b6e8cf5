"""Text files as documents of byte tokens: one file a document, its bytes and an end token."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ringattn.data.contents import contents, stamp
from ringattn.data.documents import DataError
from ringattn.data.formats.ranges import Corrupt, check_corrupt
from ringattn.data.listing import list_files

END = 256  # the token after the last byte of a document (see tokenizer.ByteTokenizer)


@dataclass(frozen=True)
class Corpus:
    """Files with their sizes in bytes, as :class:`ringattn.data.documents.Documents`; nothing is
    kept in memory but the list. ``hashes`` and ``stamps``: of files that have been looked into
    (:meth:`checked`); ``corrupt``: those that were no text."""

    root: Path
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    hashes: tuple[str, ...] = ()
    stamps: tuple[list[int], ...] = ()
    corrupt: tuple[Corrupt, ...] = ()

    @classmethod
    def open(cls, root: str | None, pattern: str) -> Corpus:
        """All files below ``root`` that match ``pattern`` (see :func:`list_files`)."""
        base, files = list_files(root, pattern)
        names, sizes = zip(*files, strict=True)
        return cls(base, names, sizes)

    def checked(
        self,
        cache: Path,
        max_corrupt: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Corpus:
        """Without the files that are not UTF-8, of which there may be ``max_corrupt``, and known
        by what is in them. Raises DataError."""
        try:
            found, stamps = contents(self.root, self.names, cache, progress)
        except OSError as error:
            raise DataError(f"cannot read {error.filename}: {error.strerror}") from None
        corrupt = [
            Corrupt(f"{self.root / name}:{c.problem.split(':')[0]}", c.problem.split(": ", 1)[1])
            for name, c in zip(self.names, found, strict=True)
            if c.problem
        ]
        check_corrupt(corrupt, max_corrupt)
        kept = [i for i, content in enumerate(found) if not content.problem]
        if not kept:
            raise DataError(f"data.root={self.root}: no text")
        return Corpus(
            self.root,
            tuple(self.names[i] for i in kept),
            tuple(stamps[i][0] for i in kept),
            tuple(found[i].sha256 for i in kept),
            tuple(stamps[i] for i in kept),
            tuple(corrupt),
        )

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64: tokens of every document, the end token included."""
        return np.array(self.sizes, np.int64) + 1

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any file's name, size or, where it is known, content."""
        hashes = self.hashes or [""] * len(self.names)
        lines = zip(self.names, self.sizes, hashes, strict=True)
        listing = "\n".join("\t".join(map(str, line)) for line in lines)
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
            same = not self.stamps or stamp(path)[:2] == self.stamps[document][:2]
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        if len(content) != wanted:
            raise DataError(f"{path} is shorter than the {size} bytes it had at the start")
        if not same:
            raise DataError(f"{path} has been written to since this run began")
        tokens = np.asarray(content[::step], np.int64)
        with_end = start <= size < stop and (size - start) % step == 0
        return np.append(tokens, END) if with_end else tokens
