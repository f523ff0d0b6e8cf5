"""Which files a source has: below one folder, through links, each once."""

from __future__ import annotations

import heapq
import os
import sysconfig
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from ringattn.data.documents import DataError

# Folders that hold a file's earlier versions under other names; wildcards pass over them as they
# pass over what is hidden.
VERSIONS = {"CVS", "_darcs", "RCS", "SCCS"}
_INSTALLED = {"site-packages", "dist-packages", "test", "__pycache__"}


def list_files(root: str | None, pattern: str) -> tuple[Path, list[tuple[str, int]]]:
    """(root, [(name below it, bytes)]): all files below ``root`` (None: this Python's standard
    library) that match ``pattern``, in the order of their names.

    ``*``, ``?`` and ``[...]`` stand for parts of a name, ``**`` for any folders. As in a shell
    they do not stand for what is hidden (``.git``), nor for folders of other version control; a
    pattern that says it by name does. Links are followed; a file or folder that several lead to
    is there once, under its own name if it has one below ``root``.

    Empty files are left out; for the standard library so are installed packages. Raises DataError
    when the root is missing, a file or folder cannot be read, a link leads nowhere, or nothing
    matches.
    """
    base = Path(root or sysconfig.get_path("stdlib"))
    try:
        base = base.expanduser()
        if not base.is_dir():
            raise DataError(f"data.root={base}: not a directory")
    except (OSError, ValueError) as error:
        raise DataError(f"data.root={base}: {getattr(error, 'strerror', None) or error}") from None
    except RuntimeError as error:  # "~nobody"
        raise DataError(f"data.root={base}: {error}") from None
    wanted = _parts(pattern)
    files = []
    for name in sorted(_walk(base, wanted, strict=root is not None)):
        if root is None and _INSTALLED & set(name.split("/")):
            continue
        path = base / name
        try:
            with path.open("rb") as file:
                file.read(1)
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"data.root={base}: cannot read {path}: {error.strerror}") from None
        if size:
            files.append((name, size))
    if not files:
        raise DataError(f"data.root={base}: no text in files that match data.glob={pattern!r}")
    return base, files


def _parts(pattern: str) -> list[str]:
    """Of a pattern, by folder. Raises DataError."""
    parts = [part for part in pattern.split("/") if part not in ("", ".")]
    if not parts or pattern.startswith("/") or ".." in parts:
        raise DataError(f"data.glob={pattern!r}: a pattern of names below data.root, as **/*.txt")
    return [*parts, "*"] if parts[-1] == "**" else parts


def _walk(base: Path, wanted: list[str], strict: bool) -> Iterator[str]:
    """Names of matching files. First what is there itself, then what links add to it."""
    start = _closed({0}, wanted)
    folders = [("", os.path.realpath(base), start)]
    visited, found = {(folders[0][1], frozenset(start))}, set()
    # Shorter names first: (depth, name, target, how far the pattern has come).
    links: list[tuple[int, str, str, frozenset[int]]] = []
    while folders or links:
        if not folders:
            _, name, target, states = heapq.heappop(links)
            if os.path.isdir(target):
                if (target, states) not in visited:
                    visited.add((target, states))
                    folders.append((name + "/", target, states))
            elif len(wanted) in states and target not in found:
                found.add(target)
                yield name
            continue
        prefix, real, states = folders.pop()
        try:
            entries = list(os.scandir(real))
        except OSError as error:
            where = base / prefix
            raise DataError(f"data.root={base}: cannot read {where}: {error.strerror}") from None
        for entry in entries:
            after = _closed(_step(states, entry.name, wanted), wanted)
            name = prefix + entry.name
            if not after:
                continue
            if entry.is_symlink():
                target = os.path.realpath(entry.path)
                if os.path.exists(target):
                    heapq.heappush(links, (name.count("/"), name, target, frozenset(after)))
                elif strict:
                    raise DataError(
                        f"data.root={base}: {base / name} is a link to {os.readlink(entry.path)}, "
                        "which leads nowhere; remove it, or give a data.glob without it"
                    )
            elif entry.is_dir():
                if after != {len(wanted)} and (entry.path, frozenset(after)) not in visited:
                    visited.add((entry.path, frozenset(after)))
                    folders.append((name + "/", entry.path, after))
            elif len(wanted) in after and entry.is_file() and entry.path not in found:
                found.add(entry.path)
                yield name


def _step(states: set[int], name: str, wanted: list[str]) -> set[int]:
    """Which parts of the pattern may come next, after a folder or file of this name."""
    special = name.startswith(".") or name in VERSIONS
    after = set()
    for state in states - {len(wanted)}:
        part = wanted[state]
        if part == "**":
            if not special:
                after.add(state)
        elif fnmatchcase(name, part) and (not special or _names(part, name)):
            after.add(state + 1)
    return after


def _names(part: str, name: str) -> bool:
    """Whether the part means what is hidden, or of version control, by its name."""
    return part.startswith(".") if name.startswith(".") else part == name


def _closed(states: set[int], wanted: list[str]) -> set[int]:
    """With what follows a ``**`` that stands for no folder."""
    for state in range(len(wanted)):
        if state in states and wanted[state] == "**":
            states = states | {state + 1}
    return states
