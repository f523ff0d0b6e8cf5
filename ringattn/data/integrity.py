"""Whether token shards are still what was written: their hashes, and ids within the vocabulary.

All of them are read once on each machine, in the background of training; what was found whole is
remembered by path, size and times, so that the next run does not read it again.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ringattn.data.contents import stamp
from ringattn.data.documents import DataError

BLOCK = 8 << 20


class Integrity:
    """Of files of tokens: (path, dtype, SHA-256, ids below). :attr:`problem` is empty until
    something is found; use as a context manager, which ends the reading."""

    def __init__(
        self, files: Sequence[tuple[Path, np.dtype, str, int]], marks: Path, first: int = 0
    ) -> None:
        """``marks``: folder of what is remembered; ``first``: where to begin (machines that share
        files begin at different ones, and see each other's marks)."""
        self.files, self.marks = [*files[first:], *files[:first]], marks
        self.problem, self.left = "", len(files)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="integrity", daemon=True)

    def __enter__(self) -> Integrity:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def finish(self, timeout_s: float) -> int:
        """Waits until all is read or something is found; returns how many files are left."""
        self._thread.join(timeout_s)
        return self.left

    def _run(self) -> None:
        for path, dtype, sha256, below in self.files:
            try:
                mark = self.marks / _name(path, sha256, below)
                if mark.exists():
                    self.left -= 1
                    continue
                whole = self._read(path, dtype, sha256, below)
            except (OSError, DataError) as error:
                self.problem = str(error)
                return
            if not whole:
                return  # the run is over
            self.left -= 1
            try:
                self.marks.mkdir(parents=True, exist_ok=True)
                mark.touch()
            except OSError:
                pass  # then it is read again

    def _read(self, path: Path, dtype: np.dtype, sha256: str, below: int) -> bool:
        """False if it was ended. Raises DataError, and OSError."""
        digest, before = hashlib.sha256(), stamp(path)
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                if self._stop.is_set():
                    return False
                digest.update(block)
                most = int(np.frombuffer(block, dtype).max())
                if most >= below:
                    raise DataError(f"{path} has token {most}; the vocabulary ends at {below - 1}")
        if digest.hexdigest() != sha256:
            raise DataError(
                f"{path} is not what was written: its hash is not that of tokens.json; make the "
                "shards again, or fetch them anew"
            )
        if stamp(path) != before:
            raise DataError(f"{path} is being written to")
        return True


def _name(path: Path, sha256: str, below: int) -> str:
    about = f"{path.resolve()} {stamp(path)} {sha256} {below}"
    return hashlib.sha256(about.encode(errors="surrogateescape")).hexdigest()[:24]
