"""The keys of ``attention``, and the mask of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

from pydantic import model_validator

from ringattn.planning import mask_text, masks
from ringattn.planning.masks import Mask
from ringattn.typed import Count, Text, Whole, settings


@settings
class Attention:
    """Who attends whom."""

    name: Literal["documents", "causal"] = "documents"
    """What a text is, which sees itself only and has positions from 0: each packed document, or
    (causal) each sequence, whatever documents it holds."""
    window: Literal["auto"] | Count | None = "auto"
    """Tokens back, itself included; auto: the model's own, if any; null: all."""
    sinks: Whole = 0
    """With a window: the first tokens of the text, which all of it attends."""
    mask: Text | None = None
    """Of a text, in place of window and sinks: "sliding_window(4096) | sinks(4)"; n is its length,
    and documents are those in it; masks: docs/attention.md."""

    @model_validator(mode="after")
    def _says_it_once(self) -> Attention:
        if self.mask is not None and (self.window not in ("auto", None) or self.sinks):
            raise ValueError(
                f"attention.mask={self.mask!r}: say window and sinks there, and leave out "
                "attention.window and attention.sinks"
            )
        return self

    @property
    def text(self) -> str:
        """The mask of one text, as :mod:`ringattn.planning.mask_text` reads it."""
        if self.mask is not None:
            return self.mask
        if self.window is None:
            return "causal"
        window = f"sliding_window({self.window})"
        return f"{window} | sinks({self.sinks})" if self.sinks else window

    def lengths(self, documents: Sequence[int], seq_len: int) -> list[int]:
        """Of the texts in sequences of ``seq_len`` that hold ``documents``."""
        if self.name == "documents":
            return list(documents)
        return [seq_len] * (sum(documents) // seq_len)

    def build(self, documents: Sequence[int], seq_len: int) -> Mask:
        """The mask of sequences laid end to end, which hold ``documents`` of these lengths. Raises
        ValueError, naming the key, where it does not fit a text."""
        if self.text == "causal":
            return masks.documents(self.lengths(documents, seq_len))
        if self.name == "documents":
            return masks.side_by_side([_of_text(self.text, n, (n,)) for n in documents])
        inside = _by_sequence(documents, seq_len)
        return masks.side_by_side([_of_text(self.text, seq_len, own) for own in inside])

    def check(self, seq_len: int) -> None:
        """Raises ValueError, naming the key, if some text of up to ``seq_len`` tokens has no
        mask."""
        texts = {1, 2, seq_len} if self.name == "documents" else {seq_len}
        for n in texts:
            self.build([n], n)


@lru_cache(maxsize=4096)
def _of_text(text: str, n: int, documents: tuple[int, ...]) -> Mask:
    try:
        mask = mask_text.parse(text, n, documents)
        if (mask.n_q, mask.n_k) != (n, n):
            raise ValueError(f"has {mask.n_q} queries and {mask.n_k} keys")
    except ValueError as error:
        raise ValueError(f"attention.mask={text!r}, for a text of {n} tokens: {error}") from None
    return mask


def _by_sequence(documents: Sequence[int], seq_len: int) -> list[tuple[int, ...]]:
    """The documents of each sequence; none reaches into the next one."""
    parts: list[list[int]] = []
    room = 0
    for length in documents:
        if not room:
            parts.append([])
            room = seq_len
        if length > room:
            raise ValueError(f"a document of {length} tokens where {room} are left of a sequence")
        parts[-1].append(length)
        room -= length
    return [tuple(part) for part in parts]
