"""The keys of ``attention``, and the masks of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ringattn.models.key_sets import NAMES as SETS
from ringattn.models.key_sets import KeySets
from ringattn.models.mixer_config import NAMES as MIXERS
from ringattn.models.mixer_config import Mixer
from ringattn.planning import mask_text, masks
from ringattn.planning.layer_plans import NONE, ONE
from ringattn.planning.masks import Mask
from ringattn.typed import Count, Text, Whole, Words, keys, settings

# In place of a window of "auto", where the kinds of layer have their own masks.
_KINDS = Annotated[
    dict[Text, Text | Mixer | KeySets] | None,
    Words(
        "null or a mapping of names to masks or mixers, as {local:causal,memory:{mixer:"
        "gated_delta}} (a mixer's keys: "
        + ", ".join(key.name for key in keys(Mixer))
        + "; its names: "
        + ", ".join(MIXERS)
        + "; of attention to sets of keys: "
        + ", ".join(key.name for key in keys(KeySets))
        + "; its names: "
        + ", ".join(SETS)
        + ")"
    ),
]


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
    kinds: _KINDS = None
    """Of a text, by kind of layer: {local:"sliding_window(1024)",global:causal}; in place of mask,
    window and sinks. none: layers without attention, of an unchanged module. A mapping with
    mixer: layers that carry a state, memory:{mixer:gated_delta,heads:4}, or attend keys that are
    chosen or summarised, routed:{mixer:moba,block:512,top_k:8}."""
    pattern: Annotated[list[Text] | None, Field(min_length=1)] = None
    """With kinds: that of each layer, from the first on, again and again:
    [local,local,local,global]."""

    @model_validator(mode="after")
    def _says_it_once(self) -> Attention:
        if self.mask is not None and (self.window not in ("auto", None) or self.sinks):
            raise ValueError(
                f"attention.mask={self.mask!r}: say window and sinks there, and leave out "
                "attention.window and attention.sinks"
            )
        if (self.kinds is None) != (self.pattern is None):
            raise ValueError(
                "attention.kinds and attention.pattern go together: the masks of kinds of layer, "
                "and the kind of each layer"
            )
        if self.kinds is None:
            return self
        if self.mask is not None or self.window not in ("auto", None) or self.sinks:
            raise ValueError(
                "attention.kinds: each has its own mask; leave out attention.mask, "
                "attention.window and attention.sinks"
            )
        for name in self.pattern:
            if name not in self.kinds:
                raise ValueError(
                    f"attention.pattern: {name!r} is none of the kinds: {', '.join(self.kinds)}"
                )
        if unused := [name for name in self.kinds if name not in self.pattern]:
            raise ValueError(f"attention.pattern has no layer of kind {', '.join(unused)}")
        if all(text == "none" for text in self.kinds.values()):
            raise ValueError("attention.kinds: some layer has to attend")
        return self

    @property
    def mixers(self) -> dict[str, Mixer]:
        """The kinds of layer that carry a state."""
        kinds = (self.kinds or {}).items()
        return {kind: value for kind, value in kinds if isinstance(value, Mixer)}

    @property
    def sets(self) -> dict[str, KeySets]:
        """The kinds of layer that attend sets of keys."""
        kinds = (self.kinds or {}).items()
        return {kind: value for kind, value in kinds if isinstance(value, KeySets)}

    @property
    def texts(self) -> dict[str, str]:
        """The mask of one text by kind of layer, as :mod:`ringattn.planning.mask_text` reads it."""
        if self.kinds is not None:
            return {k: text for k, text in self.kinds.items() if isinstance(text, str)}
        if self.mask is not None:
            return {ONE: self.mask}
        if self.window in (None, "auto"):
            return {ONE: "causal"}
        window = f"sliding_window({self.window})"
        return {ONE: f"{window} | sinks({self.sinks})" if self.sinks else window}

    def layers(self, count: int) -> tuple[str, ...]:
        """The kind of each of ``count`` layers, NONE of those without attention. Raises ValueError
        for too few for the pattern."""
        pattern = self.pattern or [ONE]
        layers = tuple(pattern[i % len(pattern)] for i in range(count))
        if missing := set(pattern) - set(layers):
            raise ValueError(
                f"attention.pattern is of {len(pattern)} layers and model.layers={count}: none "
                f"would be of kind {', '.join(sorted(missing))}"
            )
        return tuple(NONE if self.texts.get(kind) == "none" else kind for kind in layers)

    def lengths(self, documents: Sequence[int], seq_len: int) -> list[int]:
        """Of the texts in sequences of ``seq_len`` that hold ``documents``."""
        if self.name == "documents":
            return list(documents)
        return [seq_len] * (sum(documents) // seq_len)

    def states(self, documents: Sequence[int], seq_len: int) -> dict[str, list[int]]:
        """Of the kinds of layer that carry a state or attend sets of keys, the lengths after which
        these begin anew."""
        return dict.fromkeys([*self.mixers, *self.sets], self.lengths(documents, seq_len))

    def masks(self, documents: Sequence[int], seq_len: int) -> dict[str, Mask]:
        """The mask of each kind of layer that attends: see :meth:`build`."""
        attending = [kind for kind, text in self.texts.items() if text != "none"]
        return {kind: self.build(documents, seq_len, kind) for kind in attending}

    def build(self, documents: Sequence[int], seq_len: int, kind: str = ONE) -> Mask:
        """The mask of one kind of layer, of sequences laid end to end, which hold ``documents`` of
        these lengths. Raises ValueError, naming the key, where it does not fit a text."""
        text = self.texts[kind]
        if text == "causal":
            return masks.documents(self.lengths(documents, seq_len))
        key = "attention.mask" if self.kinds is None else f"attention.kinds.{kind}"
        if self.name == "documents":
            return masks.side_by_side([_of_text(key, text, n, (n,)) for n in documents])
        inside = _by_sequence(documents, seq_len)
        return masks.side_by_side([_of_text(key, text, seq_len, own) for own in inside])

    @property
    def for_any_length(self) -> bool:
        """Whether texts of all lengths have a mask, as a text has that grows token by token."""
        try:
            for n in (1, 2, 100):
                self.masks([n], n)
        except ValueError:
            return False
        return True

    def check(self, seq_len: int) -> None:
        """Raises ValueError, naming the key, if some text of up to ``seq_len`` tokens has no
        mask."""
        texts = {1, 2, seq_len} if self.name == "documents" else {seq_len}
        for n in texts:
            self.masks([n], n)


@lru_cache(maxsize=4096)
def _of_text(key: str, text: str, n: int, documents: tuple[int, ...]) -> Mask:
    try:
        mask = mask_text.parse(text, n, documents)
        if (mask.n_q, mask.n_k) != (n, n):
            raise ValueError(f"has {mask.n_q} queries and {mask.n_k} keys")
    except ValueError as error:
        raise ValueError(f"{key}={text!r}, for a text of {n} tokens: {error}") from None
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
