"""What a stream packs: documents of tokens, known by length and read piece by piece."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np


class DataError(ValueError):
    """Data that cannot be read; the message names the key and the file."""


def missing(package: str, what: str) -> DataError:
    return DataError(f"{what} needs {package}: pip install 'ringattn[data]'")


class Documents(Protocol):
    """Documents, each ending with an end token."""

    @property
    def lengths(self) -> np.ndarray:
        """int64: tokens of every document, the end token included."""

    @property
    def fingerprint(self) -> str:
        """Changes with what is in it."""

    def read(self, document: int, start: int, stop: int, step: int = 1) -> np.ndarray:
        """Tokens ``start:stop:step`` of a document, int64; shorter where the document ends.

        Raises DataError if they are not there any more.
        """


@dataclass(frozen=True)
class Subset:
    """Some documents of others: what is trained on, or what is held out."""

    whole: Documents
    chosen: np.ndarray  # int64, documents of ``whole``
    name: str

    @cached_property
    def lengths(self) -> np.ndarray:
        return self.whole.lengths[self.chosen]

    @property
    def fingerprint(self) -> str:
        return f"{self.whole.fingerprint}-{self.name}"

    def read(self, document: int, start: int, stop: int, step: int = 1) -> np.ndarray:
        return self.whole.read(int(self.chosen[document]), start, stop, step)


def hold_out(documents: Documents, share: float) -> tuple[Documents, Documents]:
    """(to train on, held out): about ``share`` of the documents, the same ones for every seed.

    Raises DataError if one of the two would be empty.
    """
    draw = np.random.default_rng(0).random(len(documents.lengths))
    parts = [np.flatnonzero(draw >= share), np.flatnonzero(draw < share)]
    if not all(map(len, parts)):
        raise DataError(
            f"eval.holdout={share:g} of {len(draw)} documents leaves {len(parts[0])} to train on "
            f"and {len(parts[1])} held out; give another share, or eval.root"
        )
    train, held_out = (
        Subset(documents, p, f"{n}{share:g}") for p, n in zip(parts, "th", strict=True)
    )
    return train, held_out
