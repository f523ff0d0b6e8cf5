"""What is in text files that are read where they lie: a hash of each, and whether it is text.

Read once per machine and remembered in the cache, by path, size and times: a file that is edited in
place is read again, also where its size stays.
"""

from __future__ import annotations

import codecs
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

BLOCK = 8 << 20
LARGE = 256 << 20  # bytes whose reading is worth a word


@dataclass(frozen=True)
class Content:
    """``problem``: line and reason, of a file that is not UTF-8; empty otherwise."""

    sha256: str
    problem: str


def stamp(path: Path) -> list[int]:
    """Changes when a file is written to. Raises OSError."""
    about = path.stat()
    return [about.st_size, about.st_mtime_ns, about.st_ctime_ns]


def read(path: Path) -> Content:
    """Raises OSError."""
    digest, decoder, problem = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), ""
    lines = 1
    with path.open("rb") as file:
        while True:
            block = file.read(BLOCK)
            digest.update(block)
            if not problem:
                held = decoder.getstate()[0]
                try:
                    decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    line = lines + (held + block)[: error.start].count(b"\n")
                    problem = f"{line}: not UTF-8 ({error.reason})"
                lines += block.count(b"\n")
            if not block:
                return Content(digest.hexdigest(), problem)


def contents(
    root: Path, names: Sequence[str], cache: Path, progress: Callable[[int, int], None]
) -> tuple[list[Content], list[list[int]]]:
    """Of the files, in order, and the stamps that they had. ``progress(done, total)`` in bytes,
    where there is much to read. Raises OSError."""
    cache.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:16]
    file = cache / f"contents-{key}.json"
    with file.with_suffix(".lock").open("w") as guard:  # the first process of a machine reads
        fcntl.flock(guard, fcntl.LOCK_EX)
        known = _known(file)
        stamps = [stamp(root / name) for name in names]
        new = [
            i for i, name in enumerate(names)
            if known.get(_text(name), [None])[0] != stamps[i]
        ]  # fmt: skip
        done, total = 0, sum(stamps[i][0] for i in new)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            paths = [root / names[i] for i in new]
            for i, content in zip(new, pool.map(read, paths), strict=True):
                known[_text(names[i])] = [stamps[i], content.sha256, content.problem]
                done += stamps[i][0]
                if total >= LARGE:
                    progress(done, total)
        if new:
            draft = file.with_suffix(".tmp")
            draft.write_text(json.dumps(known))
            draft.replace(file)
    return [Content(*known[_text(name)][1:]) for name in names], stamps


def _text(name: str) -> str:
    """A file's name as JSON can have it, whatever its bytes."""
    return os.fsencode(name).decode("latin-1")


def _known(file: Path) -> dict[str, list]:
    try:
        found = json.loads(file.read_text())
        sound = isinstance(found, dict) and all(len(entry) == 3 for entry in found.values())
        return found if sound else {}
    except (OSError, ValueError, TypeError):
        return {}
