"""``ringattn tokenize`` and ``ringattn bpe``: text to token shards, text to a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from ringattn.cli.request import Key, RequestError, choice, count, flag, integer, parse, writable
from ringattn.data import shards
from ringattn.data.formats import FORMATS
from ringattn.data.formats.ranges import Corrupt
from ringattn.data.records import Source
from ringattn.data.tokenizer import LEAST_BPE, TokenizerKeys, train_bpe

SOURCE = {
    "root": Key(str, None, "a folder of text, JSONL (.gz too) or Parquet, or a saved dataset"),
    "glob": Key(str, "**/*", "which of its files"),
    "format": Key(choice("auto", *FORMATS), "auto", f"auto (by ending) or {', '.join(FORMATS)}"),
    "field": Key(str, "text", "of a JSONL record, a Parquet file or a dataset"),
    "split": Key(str, "train", "of a DatasetDict"),
    "out": Key(str, None, "what is written; it may not exist yet"),
}
TOKENIZE = SOURCE | {
    "tokenizer": Key(str, None, "a tokenizer.json or its folder; by default bytes"),
    "end": Key(str, None, "its token after a document; by default what it says itself"),
    "template": Key(flag, None, "put around documents what it does; by default as it says itself"),
    "special_tokens": Key(flag, False, "text that spells a control token becomes that token"),
    "max_corrupt": Key(integer, 10, "records that may be left out because they cannot be read"),
    "workers": Key(count, None, "processes; by default one per core"),
}
BPE = SOURCE | {
    "vocab_size": Key(count, 32000, "tokens"),
    "max_corrupt": Key(integer, 10, "records that may be left out because they cannot be read"),
}


def tokenize(arguments: Sequence[str]) -> int:
    """The command; prints what it wrote as JSON."""
    values = _values("tokenize", TOKENIZE, arguments)
    keys = TokenizerKeys(
        values["tokenizer"], values["end"], values["template"], values["special_tokens"]
    )
    try:
        source = _source(values)
        with _progress("tokenizing") as report:
            written = shards.write(
                source, Path(values["out"]), keys, values["max_corrupt"], values["workers"],
                report,
            )  # fmt: skip
    except ValueError as error:
        raise RequestError(str(error)) from None
    shown = ("tokens", "documents", "corrupt", "control_tokens", "vocab_size")
    print(json.dumps({"out": values["out"], **{key: written.about[key] for key in shown}}))
    return 0


def bpe(arguments: Sequence[str]) -> int:
    """The command: a byte-level BPE of the source's text."""
    values = _values("bpe", BPE, arguments)
    corrupt: list[Corrupt] = []
    try:
        source = _source(values)
        total = sum(part.size for part in source.parts)
        with _progress("reading") as report:

            def texts() -> Iterator[str]:
                done = 0
                for part in source.parts:
                    for text in source.texts(part):
                        if not isinstance(text, Corrupt):
                            yield text
                            continue
                        corrupt.append(text)
                        if len(corrupt) > values["max_corrupt"]:
                            raise RequestError(f"{text.where}: {text.reason}")
                    done += part.size
                    report(done, total)

            size = train_bpe(texts(), values["vocab_size"], Path(values["out"]))
    except (ValueError, OSError) as error:
        raise RequestError(str(error)) from None
    print(json.dumps({"out": values["out"], "vocab_size": size, "corrupt": len(corrupt)}))
    return 0


def _values(command: str, keys: dict[str, Key], arguments: Sequence[str]) -> dict[str, Any]:
    values, _ = parse(command, keys, arguments, lambda parser: None)
    for key in ("root", "out"):
        if values[key] is None:
            raise RequestError(f"{key} must be given: {keys[key].text}")
    if values["max_corrupt"] < 0:
        raise RequestError(f"max_corrupt must be at least 0; got {values['max_corrupt']}")
    if Path(values["out"]).exists():
        raise RequestError(f"out={values['out']} is already there")
    if values.get("vocab_size", LEAST_BPE) < LEAST_BPE:
        raise RequestError(
            f"vocab_size must be at least {LEAST_BPE}, bytes and an end; got {values['vocab_size']}"
        )
    writable("out", values["out"])
    return values


def _source(values: dict[str, Any]) -> Source:
    return Source.open(
        values["root"], values["glob"], values["format"], values["field"], values["split"]
    )


class _progress:
    """A bar on stderr; calling it with (done, total) bytes moves it."""

    def __init__(self, what: str) -> None:
        self.bar = Progress(
            TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn(),
            console=Console(stderr=True),
        )  # fmt: skip
        self.task = self.bar.add_task(what, total=None)

    def __enter__(self) -> Callable[[int, int], None]:
        self.bar.start()
        return lambda done, total: self.bar.update(self.task, completed=done, total=total)

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
