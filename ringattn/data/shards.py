"""Token shards: documents of tokens in memory-mapped files, written in parallel from any source.

A folder of them has ``tokens.json`` (written last), and per shard ``N.tokens`` (little-endian
uint16 or uint32) and ``N.ends`` (int64: where each document ends), ``corrupt.jsonl`` with every
record that was left out, and the tokenizer.
"""

from __future__ import annotations

import glob
import hashlib
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ringattn import living
from ringattn.data import tokenizer as tokenizers
from ringattn.data.documents import DataError
from ringattn.data.formats.ranges import Corrupt, FileRange, check_corrupt
from ringattn.data.records import Source
from ringattn.data.tokenizer import Tokenizer, TokenizerKeys

MANIFEST = "tokens.json"
FORMAT = 1


class Shards:
    """The :class:`ringattn.data.documents.Documents` of a folder; nothing is read but what is
    asked for. Raises DataError if it is not such a folder or not whole."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            content = (root / MANIFEST).read_bytes()
            about = json.loads(content)
            if about["format"] != FORMAT:
                raise DataError(f"{root}: token shards of format {about['format']}, not {FORMAT}")
            self.about: dict[str, Any] = about
            self._dtype, self._ends = np.dtype(about["dtype"]), []
            for shard in about["shards"]:
                path = root / shard["name"]
                _check_size(path.with_suffix(".tokens"), self._dtype, shard["tokens"])
                _check_size(path.with_suffix(".ends"), np.dtype("<i8"), shard["documents"])
                self._ends.append(_ends(path.with_suffix(".ends"), shard))
        except OSError as error:
            raise DataError(f"data.root={root}: {error.filename}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"data.root={root}: {MANIFEST} is damaged: {error}") from None
        # Few at a time: each map holds a file descriptor.
        self._tokens = lru_cache(64)(self._map)
        self.fingerprint = hashlib.sha256(content).hexdigest()[:16]
        self._first = np.cumsum([0, *(len(ends) for ends in self._ends)])
        starts = [np.concatenate([[0], ends[:-1]]) for ends in self._ends if len(ends)]
        lengths = [e - s for e, s in zip((e for e in self._ends if len(e)), starts, strict=True)]
        self.lengths = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
        if not len(self.lengths):
            raise DataError(f"data.root={root}: no documents")

    @property
    def tokenizer(self) -> Tokenizer:
        """The one that the tokens came from. Raises DataError if it has changed."""
        loaded = tokenizers.make(self.tokenizer_keys)
        for key in ("vocab_size", "fingerprint"):
            there, here = self.about.get(key), getattr(loaded, key)
            if there is not None and there != here:
                raise DataError(
                    f"data.root={self.root}: its tokenizer is not the one that its tokens were "
                    f"made with ({key} {here}, not {there})"
                )
        return loaded

    @property
    def files(self) -> list[tuple[Path, np.dtype, str, int]]:
        """Of tokens: path, dtype, SHA-256, ids below."""
        return [
            (self.root / f"{s['name']}.tokens", self._dtype, s["sha256"], self.about["vocab_size"])
            for s in self.about["shards"]
            if s["tokens"]
        ]

    @property
    def tokenizer_keys(self) -> TokenizerKeys:
        """The keys of ``data`` that the tokens were made with."""
        name = self.about["tokenizer"]
        return TokenizerKeys(
            name if name == tokenizers.BYTES else str(self.root / name),
            self.about["end_token"],
            # As it was before there were these keys.
            self.about.get("template", False),
            self.about.get("special_tokens", True),
        )

    def _map(self, shard: int) -> np.ndarray:
        path = self.root / f"{self.about['shards'][shard]['name']}.tokens"
        try:
            return np.memmap(path, self._dtype, "r")
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read {path}: {error}") from None

    def read(self, document: int, start: int, stop: int, step: int = 1) -> np.ndarray:
        shard = int(np.searchsorted(self._first, document, side="right")) - 1
        index = document - int(self._first[shard])
        end = int(self._ends[shard][index])
        first = int(self._ends[shard][index - 1]) if index else 0
        part = self._tokens(shard)[first + start : min(first + stop, end) : step].astype(np.int64)
        if len(part) and int(part.max()) >= self.about["vocab_size"]:
            name = self.about["shards"][shard]["name"]
            raise DataError(
                f"{self.root / name}.tokens has token {int(part.max())}; the vocabulary ends at "
                f"{self.about['vocab_size'] - 1}"
            )
        return part


def _check_size(path: Path, dtype: np.dtype, count: int) -> None:
    size = path.stat().st_size
    if size != count * dtype.itemsize:
        raise DataError(f"{path} has {size} bytes, not those of {count} {dtype}")


def _ends(path: Path, shard: dict[str, Any]) -> np.ndarray:
    """Where documents end. Raises DataError if that cannot be."""
    content = path.read_bytes()
    if "ends_sha256" in shard and hashlib.sha256(content).hexdigest() != shard["ends_sha256"]:
        raise DataError(f"{path} is not what was written: its hash is not that of {MANIFEST}")
    ends = np.frombuffer(content, "<i8")
    if not (np.diff(ends, prepend=0) > 0).all() or shard["tokens"] != (
        ends[-1] if len(ends) else 0
    ):
        raise DataError(f"{path}: documents do not end one after the other, the last with the file")
    return ends


@dataclass(frozen=True)
class _Written:
    name: str
    tokens: int
    documents: int
    control: int  # tokens that its text spells
    sha256: str
    ends_sha256: str
    corrupt: list[Corrupt]


_BYTES = TokenizerKeys()
_loaded = lru_cache(1)(tokenizers.make)  # once per process, not once per shard


def _start(parent: int) -> None:
    """Of a process that tokenizes: it ends with the one that started it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are parallel already

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_unit(
    folder: Path, number: int, parts: list[FileRange], source: Source, keys: TokenizerKeys,
    most: int,
) -> _Written:  # fmt: skip
    """One shard. Gives up after more than ``most`` corrupt records: the caller ends it."""
    tokenizer = _loaded(keys)
    dtype, name = _dtype(tokenizer), f"{number:05}"
    corrupt: list[Corrupt] = []
    ends, at, control, digest = [], 0, 0, hashlib.sha256()
    with open(folder / f"{name}.tokens", "wb") as file:
        for part in parts:
            for text in source.texts(part):
                if isinstance(text, Corrupt):
                    corrupt.append(text)
                    if sum(c.records for c in corrupt) > most:
                        return _Written(name, at, len(ends), control, "", "", corrupt)
                    continue
                if not text:
                    continue
                control += tokenizer.control_tokens(text)
                tokens = tokenizer.document(text).astype(dtype).tobytes()
                file.write(tokens)
                digest.update(tokens)
                at += len(tokens) // dtype.itemsize
                ends.append(at)
    of_ends = np.array(ends, "<i8").tobytes()
    (folder / f"{name}.ends").write_bytes(of_ends)
    hashes = digest.hexdigest(), hashlib.sha256(of_ends).hexdigest()
    return _Written(name, at, len(ends), control, *hashes, corrupt)


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


def write(
    source: Source,
    out: Path,
    tokenizer: TokenizerKeys = _BYTES,
    max_corrupt: int = 0,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Shards:
    """Tokenizes a source into ``out`` (which may not exist), with ``workers`` processes (None: one
    per core); the result depends on the source and the tokenizer only. ``progress(done, total)``
    is in bytes. Records that cannot be read are left out, at most ``max_corrupt``.

    Raises DataError; nothing is then left at ``out``.
    """
    loaded = tokenizers.make(tokenizer)
    units = source.units()
    workers = min(workers or os.cpu_count() or 1, len(units))
    draft = living.draft(out)
    try:
        draft.mkdir(parents=True)
        for left in living.abandoned(out.parent, f"{glob.escape(out.name)}.*"):
            shutil.rmtree(left, ignore_errors=True)
        written = _write_units(units, draft, source, tokenizer, max_corrupt, workers, progress)
        tokens = sum(w.tokens for w in written)
        if not tokens:
            raise DataError(f"data.root={source.root}: no text")
        corrupt = [c for w in written for c in w.corrupt]
        if corrupt:
            lines = [json.dumps(asdict(c)) + "\n" for c in corrupt]
            (draft / "corrupt.jsonl").write_text("".join(lines))
        name = tokenizers.BYTES
        if isinstance(loaded, tokenizers.FileTokenizer):
            name = "tokenizer.json"
            shutil.copy(loaded.path, draft / name)
            beside = loaded.path.with_name("tokenizer_config.json")
            if beside.is_file():
                shutil.copy(beside, draft)
        about = {
            "format": FORMAT,
            "dtype": _dtype(loaded).str,
            "tokenizer": name,
            "end_token": tokenizer.end,
            "template": tokenizer.template,
            "special_tokens": tokenizer.special_tokens,
            "vocab_size": loaded.vocab_size,
            "fingerprint": loaded.fingerprint,
            "tokens": tokens,
            "documents": sum(w.documents for w in written),
            "corrupt": sum(c.records for c in corrupt),
            "control_tokens": sum(w.control for w in written),
            "shards": [
                {
                    "name": w.name,
                    "tokens": w.tokens,
                    "documents": w.documents,
                    "sha256": w.sha256,
                    "ends_sha256": w.ends_sha256,
                }
                for w in written
            ],
        }
        (draft / MANIFEST).write_text(json.dumps(about, indent=1) + "\n")
        draft.rename(out)
    except OSError as error:
        raise DataError(f"{error.filename or out}: {error.strerror}") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Shards(out)


def _write_units(
    units: list[list[FileRange]], folder: Path, source: Source, tokenizer: TokenizerKeys,
    most: int, workers: int, progress: Callable[[int, int], None],
) -> list[_Written]:  # fmt: skip
    sizes = [sum(part.size for part in unit) for unit in units]
    bare = replace(source, parts=())  # a job has its own parts
    jobs = [(folder, i, unit, bare, tokenizer, most) for i, unit in enumerate(units)]
    written: list[_Written] = []

    def add(result: _Written) -> None:
        written.append(result)
        check_corrupt([c for w in written for c in w.corrupt], most)
        progress(sum(sizes[: len(written)]), sum(sizes))

    if workers == 1:
        for job in jobs:
            add(_write_unit(*job))
        return written
    # Not forked: the caller may have threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (os.getpid(),)) as pool:
        futures = [pool.submit(_write_unit, *job) for job in jobs]
        try:
            for future in futures:
                add(future.result())
        except BrokenProcessPool:
            raise DataError(
                "a tokenizing process was killed (out of memory?); give fewer data.workers"
            ) from None
        finally:
            for future in futures:
                future.cancel()
    return written
