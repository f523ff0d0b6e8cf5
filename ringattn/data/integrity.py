"""Whether token shards are still what was written: their hashes, and ids within the vocabulary.

All of them are read once on each machine, in the background of training; what was found whole is
remembered by path, size and times, so that the next run does not read it again.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
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
                with suppress(OSError):
                    if mark.exists():
                        self.left -= 1
                        continue
                if not self._read(path, dtype, sha256, below):
                    return  # the run is over
            except DataError as error:
                self.problem = str(error)
                return
            except OSError:
                continue  # not seen to be whole; whoever trains on it will hear of it
            self.left -= 1
            with suppress(OSError):  # then it is read again
                self.marks.mkdir(parents=True, exist_ok=True)
                mark.touch()

    def _read(self, path: Path, dtype: np.dtype, sha256: str, below: int) -> bool:
        """False if it was ended. Raises DataError, and OSError."""
        digest, before = hashlib.sha256(), stamp(path)
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                begin = time.monotonic()
                digest.update(block)
                if len(block) % dtype.itemsize:
                    raise DataError(f"{path} ends in the middle of a token")
                most = int(np.frombuffer(block, dtype).max())
                if most >= below:
                    raise DataError(f"{path} has token {most}; the vocabulary ends at {below - 1}")
                # Half of a core at most, and no memory of the system: training comes first.
                os.posix_fadvise(file.fileno(), 0, file.tell(), os.POSIX_FADV_DONTNEED)
                if self._stop.wait(time.monotonic() - begin):
                    return False
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
