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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
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
            try:
                block = file.read(BLOCK)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from None
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
    where there is much to read. A cache that cannot be written is gone without. Raises OSError of
    the files."""
    key = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:16]
    file = cache / f"contents-{key}.json"
    stamps = [stamp(root / name) for name in names]
    texts = list(map(_text, names))
    known = _known(file)
    if _new(known, texts, stamps):
        with _alone(file.with_suffix(".lock")):  # the first process of a machine reads
            known = _known(file)
            if new := _new(known, texts, stamps):
                done, total = 0, sum(stamps[i][0] for i in new)
                with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                    found = pool.map(read, (root / names[i] for i in new))
                    for i, content in zip(new, found, strict=True):
                        known[texts[i]] = [stamps[i], content.sha256, content.problem]
                        done += stamps[i][0]
                        if total >= LARGE:
                            progress(done, total)
                with suppress(OSError):
                    draft = file.with_suffix(".tmp")
                    draft.write_text(json.dumps(known))
                    draft.replace(file)
    return [Content(*known[text][1:]) for text in texts], stamps


def _new(known: dict[str, list], texts: list[str], stamps: list[list[int]]) -> list[int]:
    return [i for i, text in enumerate(texts) if known.get(text, [None])[0] != stamps[i]]


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Holds a lock, where that is possible."""
    with ExitStack() as held:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(held.enter_context(path.open("w")), fcntl.LOCK_EX)
        yield


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
