"""The configured data: a stream to train on, one that is held out, and their tokenizer."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ringattn import living
from ringattn.data import settings, tokenizer
from ringattn.data.corpus import Corpus
from ringattn.data.documents import DataError, Documents, hold_out
from ringattn.data.probes import Probe
from ringattn.data.records import Source, has_file
from ringattn.data.shards import MANIFEST, Shards, write
from ringattn.data.stream import Mixture, Sequences, Stream
from ringattn.data.tokenizer import Tokenizer, TokenizerKeys
from ringattn.typed import SettingsError

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Opened:
    """``remarks``: what a person should know of it, a line each; ``files``: of tokens, whose
    integrity is to be seen (:mod:`ringattn.data.integrity`), with ``marks`` of earlier runs."""

    tokenizer: Tokenizer
    train: Sequences
    held_out: Sequences | None
    remarks: list[str]
    files: list[tuple[Path, np.dtype, str, int]] = field(default_factory=list)
    marks: Path = Path()

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.train.fingerprint.encode()).hexdigest()[:16]


def open_data(
    data: settings.Data,
    seq_len: int,
    seed: int,
    progress: Progress,
    holdout: float = 0.0,
    held_out_root: str | None = None,
) -> Opened:
    """Opens what the keys of ``data`` name; text that needs it is tokenized into the cache first,
    once per machine. ``holdout`` and ``held_out_root``: eval.holdout and eval.root. Raises
    SettingsError or DataError, naming the key."""
    if held_out_root is not None and holdout:
        raise SettingsError("eval.holdout and eval.root: give one of them")
    if data.format in settings.TASKS:
        if held_out_root is not None or holdout:
            raise SettingsError(
                f"data.format={data.format} has no documents to hold out; leave out "
                "eval.holdout and eval.root, and give eval.probes"
            )
        loaded = tokenizer.make(data.tokenizer_keys)
        task = _task(data.format, data.halvings, loaded, seq_len, seed)
        return Opened(loaded, task, None, [f"data: {data.format}, made on the fly"])
    parts, weights = [data], [1.0]
    if data.mix:
        parts, weights = [_like(data, part) for part in data.mix], [p.weight for p in data.mix]
    tasks = [part.format in settings.TASKS for part in parts]
    written = [weight for weight, task in zip(weights, tasks, strict=True) if not task]
    whole = opened = [
        _open(part, progress) for part, task in zip(parts, tasks, strict=True) if not task
    ]
    loaded = _tokenizer(data, opened) if opened else tokenizer.make(data.tokenizer_keys)
    evaluation = [None] * len(opened)
    if not opened and (holdout or held_out_root is not None):
        raise SettingsError(
            "eval.holdout, eval.root: data.mix has no documents to hold out; leave them out"
        )
    if held_out_root is not None:
        text = next(part for part, task in zip(parts, tasks, strict=True) if not task)
        other = replace(text, root=held_out_root, **_tokenizer_of(opened[0]))
        evaluation = [_open(other, progress)]
        if _tokenizer(data, evaluation).fingerprint != loaded.fingerprint:
            raise SettingsError(
                f"eval.root={held_out_root}: its tokens are of another tokenizer than data's"
            )
    elif holdout:
        opened, evaluation = zip(*(hold_out(d, holdout) for d in opened), strict=True)
    remarks: list[str] = []

    def texts(documents: list[Documents], seed: int, several: bool) -> list[Sequences]:
        seeds = [(seed, i) for i in range(len(documents))] if several else [seed]
        return [
            Stream(d, seq_len, s, data.packing, loaded.end)
            for d, s in zip(documents, seeds, strict=True)
        ]

    def together(streams: list[Sequences], weights: list[float], seed: int) -> Sequences:
        return streams[0] if len(streams) == 1 else Mixture(streams, weights, seed)

    streams = texts(list(opened), seed, len(parts) > 1)
    remarks += [_remark(documents, own) for documents, own in zip(whole, streams, strict=True)]
    for at, part in enumerate(parts):
        if tasks[at]:
            streams.insert(at, _task(part.format, data.halvings, loaded, seq_len, seed))
            remarks.append(f"data: {part.format}, made on the fly")
    train = together(streams, weights, seed)
    held_out = None
    if evaluation and evaluation[0] is not None:
        held = texts(list(evaluation), 0, len(evaluation) > 1)
        held_out = together(held, written[: len(held)], 0)
        tokens = sum(int(d.lengths.sum()) for d in evaluation)
        remarks.append(f"held out: {sum(len(d.lengths) for d in evaluation):,} documents, "
                       f"{tokens:,} tokens")  # fmt: skip
    shards = [d for d in (*whole, *evaluation) if isinstance(d, Shards)]
    files = [file for each in shards for file in each.files]
    return Opened(loaded, train, held_out, remarks, files, _cache(data) / "whole")


def _task(name: str, halvings: int, loaded: Tokenizer, seq_len: int, seed: int) -> Probe:
    """To train on: with a seed that no evaluation draws from."""
    return Probe(name, loaded, seq_len, seed + 2**32, halvings=halvings)


def _like(data: settings.Data, part: settings.Part) -> settings.Data:
    """``data`` with what ``part`` says otherwise."""
    own = {"root": part.root, "glob": part.glob, "format": part.format, "field": part.field,
           "split": part.split}  # fmt: skip
    return replace(data, mix=None, **{key: x for key, x in own.items() if x is not None})


def _open(part: settings.Data, progress: Progress) -> Documents:
    root = part.root
    if root is None and part.format == "tokens":
        raise SettingsError("data.root must be given for data.format=tokens")
    if root is not None and (
        part.format == "tokens" or (part.format == "auto" and has_file(root, MANIFEST))
    ):
        return Shards(Path(os.path.expanduser(root)))
    source = Source.open(root, part.glob, part.format, part.field, part.split)
    if source.format == "text" and part.tokenizer in (None, tokenizer.BYTES):
        return Corpus.open(root, part.glob).checked(_cache(part), part.max_corrupt, progress)
    return _cached(source, part, progress)


def _cached(source: Source, part: settings.Data, progress: Progress) -> Shards:
    """Token shards of a source, written by the first process of a machine that comes here."""
    loaded = tokenizer.make(part.tokenizer_keys)
    about = [loaded.fingerprint, source.format, source.field, source.split, str(source.root)]
    if part.special_tokens:
        about.append("spelled ends once")  # a cache of before has them twice
    for each in source.parts:
        about += [each.path, str(each.start), str(each.stop), _age(each.path)]
    key = hashlib.sha256("\n".join(about).encode(errors="surrogateescape")).hexdigest()[:16]
    cache = _cache(part)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for left in living.abandoned(cache):
            shutil.rmtree(left, ignore_errors=True)
        with (cache / f"{key}.lock").open("w") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            if (cache / key / MANIFEST).is_file():
                shards = Shards(cache / key)
                if (corrupt := shards.about["corrupt"]) > part.max_corrupt:
                    raise DataError(
                        f"data.max_corrupt={part.max_corrupt}: {corrupt} records cannot be "
                        f"read: {cache / key / 'corrupt.jsonl'}"
                    )
                return shards
            return write(
                source, cache / key, part.tokenizer_keys, part.max_corrupt, part.workers,
                progress,
            )  # fmt: skip
    except OSError as error:
        raise SettingsError(f"data.cache={cache}: {error.strerror}") from None


def _cache(part: settings.Data) -> Path:
    try:
        usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # nobody's home
        usual = Path(tempfile.gettempdir())
    return Path(part.cache or usual / "ringattn" / "tokens").expanduser()


def _age(path: str) -> str:
    """Changes when a file does, or any file of a saved dataset."""
    below = sorted(Path(path).rglob("*")) if os.path.isdir(path) else [Path(path)]
    return " ".join(f"{p}:{p.stat().st_mtime_ns}:{p.stat().st_size}" for p in below)


def _tokenizer_of(documents: Documents) -> dict[str, Any]:
    """The keys of ``data`` that documents were made with."""
    keys = TokenizerKeys()
    if isinstance(documents, Shards) and documents.tokenizer.fingerprint != tokenizer.BYTES:
        keys = documents.tokenizer_keys
    return {"tokenizer": keys.name, "end": keys.end, "template": keys.template,
            "special_tokens": keys.special_tokens}  # fmt: skip


def _tokenizer(data: settings.Data, opened: list[Documents]) -> Tokenizer:
    """The one tokenizer of all sources: token shards bring theirs."""
    tokenizers = [
        d.tokenizer if isinstance(d, Shards) else tokenizer.ByteTokenizer() for d in opened
    ]
    if len({each.fingerprint for each in tokenizers}) > 1:
        raise DataError(
            "data.mix: its sources have different tokenizers; tokenize them with the same one"
        )
    if data.tokenizer is not None:
        shards = next((d for d in opened if isinstance(d, Shards)), None)
        asked = tokenizer.make(_as_in(data.tokenizer_keys, shards))
        if asked.fingerprint != tokenizers[0].fingerprint:
            raise DataError(
                f"data.tokenizer={data.tokenizer}: the tokens in data.root={data.root} are "
                "of another one, or used otherwise; leave it out"
            )
        return tokenizers[0]
    for key in ("end", "template", "special_tokens"):
        value = getattr(data, key)
        if value in (None, False):
            continue
        shards = next((d for d in opened if isinstance(d, Shards)), None)
        if shards is None or shards.tokenizer.fingerprint == tokenizer.BYTES:
            raise DataError(f"data.{key}={value}: bytes have none; give data.tokenizer")
        if getattr(shards.tokenizer_keys, key) != value:
            raise DataError(
                f"data.{key}={value}: the tokens in data.root={shards.root} were made with "
                f"{getattr(shards.tokenizer_keys, key)}; make them again with `ringattn tokenize`"
            )
    return tokenizers[0]


def _as_in(keys: TokenizerKeys, shards: Shards | None) -> TokenizerKeys:
    """What is not asked for is as the tokens were made."""
    if shards is None:
        return keys
    made = shards.tokenizer_keys
    return replace(
        keys,
        template=made.template if keys.template is None else keys.template,
        special_tokens=keys.special_tokens or made.special_tokens,
    )


def _remark(documents: Documents, stream: Stream) -> str:
    """Of a source as it was opened, and what is trained on of it."""
    lengths = stream.documents.lengths
    text = f"data: {len(lengths):,} documents, {int(lengths.sum()):,} tokens"
    if isinstance(documents, Corpus) or documents.tokenizer.fingerprint == tokenizer.BYTES:
        text += " (bytes)"
    if stream.packing != "cut":
        text += f", {stream.packing} leaves {stream.waste:.2%} of the rows empty"
    if isinstance(documents, Shards) and (corrupt := documents.about["corrupt"]):
        text += f", {corrupt} corrupt records left out ({documents.root / 'corrupt.jsonl'})"
    if isinstance(documents, Corpus) and (files := documents.corrupt):
        text += f", {len(files)} corrupt records left out ({files[0].where}: {files[0].reason}"
        text += ")" if len(files) == 1 else ", ...)"
    if isinstance(documents, Shards) and (spelled := documents.about.get("control_tokens")):
        become = documents.tokenizer_keys.special_tokens
        text += f"; its text spells {spelled:,} control tokens, which "
        text += "they become" if become else "stay text"
        text += f" (data.special_tokens={str(become).lower()})"
    return text
