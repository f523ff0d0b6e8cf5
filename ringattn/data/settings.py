"""The keys of ``data``."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from ringattn.data.formats import FORMATS
from ringattn.data.packing import NAMES as PACKINGS
from ringattn.data.tokenizer import TokenizerKeys
from ringattn.typed import Count, Flag, OneOf, Positive, Text, Whole, Words, settings

TASKS = ("passkey", "recall")  # made on the fly: see ringattn.data.probes
Format = Annotated[Any, OneOf("auto", *FORMATS, "tokens", *TASKS)]


@settings
class Part:
    """One of several sources: what differs from the keys of ``data``, and how much of it."""

    weight: Positive
    root: Text | None = None
    glob: Text | None = None
    format: Format | None = None
    field: Text | None = None
    split: Text | None = None

    @model_validator(mode="after")
    def _is_somewhere(self) -> Part:
        files = {name: getattr(self, name) for name in ("root", "glob", "field", "split")}
        if self.format not in TASKS and self.root is None:
            raise ValueError(f"data.mix: a source needs a root, or a format of {', '.join(TASKS)}")
        if self.format in TASKS and any(value is not None for value in files.values()):
            raise ValueError(
                f"data.mix: format={self.format} is made on the fly and has no {', '.join(files)}"
            )
        return self


@settings
class Data:
    """What is trained on, and how text becomes rows of tokens."""

    root: Text | None = None
    """Folder of the files; null: the standard library of the Python that runs, or what mix says."""
    glob: Text = "**/*"
    """Which files below it."""
    format: Format = "auto"
    """By ending: text, jsonl (.gz too), parquet; datasets (saved on disk), tokens (shards of
    `ringattn tokenize`); passkey and recall are made on the fly."""
    field: Text = "text"
    """Of a JSONL record, a Parquet file or a dataset."""
    split: Text = "train"
    """Of a datasets.DatasetDict."""
    tokenizer: Text | None = None
    """A tokenizer.json or its folder; null: bytes, or that of token shards. A model.path that has
    a tokenizer wants its own, or "bytes" said."""
    end: Text | None = None
    """The tokenizer's token after a document; null: what tokenizer_config.json says."""
    template: Flag | None = None
    """Put around documents what the tokenizer.json does (a token at the beginning, as of Llama 3);
    null: so, unless tokenizer_config.json says otherwise, which is refused."""
    special_tokens: Flag = False
    """Text that spells a control token, as <|endoftext|>, becomes that token; false: stays text."""
    packing: Annotated[Any, OneOf(*PACKINGS)] = "cut"
    """cut: joined and cut; best_fit: whole documents, rows filled as well as can be; balanced:
    whole documents, rows of as equal work for attention as can be."""
    balance: Flag = True
    """Deal the rows of an optimizer step, which stay the same, to data ranks and micro-steps by
    how much work they are."""
    mix: Annotated[
        Annotated[list[Part], Field(min_length=2)] | None,
        Words(
            "null or a list of at least two {root: PATH, weight: NUMBER above 0}, each with glob, "
            "format, field or split where it differs; in place of a root {format: passkey}"
        ),
    ] = None
    """Several sources: [{root: A, weight: 2}, {format: passkey, weight: 1}]."""
    halvings: Whole = 3
    """A task's rows are one text, or two of half the length, and so on, in turns, down to this many
    halvings, or to what the task needs: short texts are learned first, and teach the long ones."""
    max_corrupt: Whole = 10
    """Records that may be left out because they cannot be read."""
    cache: Text | None = None
    """Where text is kept tokenized; null: ~/.cache/ringattn/tokens."""
    workers: Count | None = None
    """Processes that tokenize; null: one per core."""

    @model_validator(mode="after")
    def _tasks_fit(self) -> Data:
        if self.mix and self.format in TASKS:
            raise ValueError(
                f"data.format={self.format} beside data.mix: name it in the mix, as "
                f"{{format: {self.format}, weight: 1}}"
            )
        tasks = [part.format for part in self.mix or () if part.format in TASKS]
        if len(set(tasks)) < len(tasks):
            raise ValueError("data.mix: a task can be there once; give it more weight")
        return self

    @property
    def tokenizer_keys(self) -> TokenizerKeys:
        return TokenizerKeys(self.tokenizer, self.end, self.template, self.special_tokens)
