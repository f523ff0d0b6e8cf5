"""Documents shuffled and packed into sequences of equal length: a pure function of the sequence
number, so a stream's position is one integer, whatever the world, and any rank reads only its own
tokens.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from ringattn.batches import IGNORED
from ringattn.data.documents import Documents
from ringattn.data.packing import Rows, balanced, best_fit
from ringattn.planning.layouts import Layout

EMPTY = -1  # the document of tokens that fill up a row


@dataclass(frozen=True)
class Span:
    """``length`` tokens of ``document`` from its token ``start``, at ``at`` in a sequence;
    ``source`` says whose document, in a mixture."""

    document: int
    start: int
    length: int
    at: int
    source: int = 0


@dataclass(frozen=True)
class LocalBatch:
    """One rank's part of a batch: several sequences end to end on one axis. int64 ``[tokens]``."""

    tokens: np.ndarray
    labels: np.ndarray


class Sequences(ABC):
    """Numbered sequences of ``seq_len`` tokens, endlessly."""

    seq_len: int
    fingerprint: str
    filler: int = 0  # the token of what is left empty; never supervised

    @abstractmethod
    def spans(self, sequence: int) -> list[Span]:
        """The pieces of documents that make up a sequence."""

    @abstractmethod
    def tokens(self, span: Span, start: int, stop: int, step: int) -> np.ndarray:
        """Tokens ``start:stop:step`` of a span's document; shorter where the document ends."""

    def labels(self, span: Span, start: int, stop: int, step: int) -> np.ndarray:
        """What each of these tokens is to predict: the next one."""
        return self.tokens(span, start + 1, stop + 1, step)

    def batch_spans(self, sequences: list[int]) -> list[Span]:
        """The spans of several sequences laid end to end."""
        return [
            replace(span, at=span.at + row * self.seq_len)
            for row, sequence in enumerate(sequences)
            for span in self.spans(sequence)
        ]

    def digest(self, sequences: list[int]) -> str:
        """Stands for the text of ``sequences``: where it is, and the beginning of every piece."""
        digest = hashlib.sha256(self.fingerprint.encode())
        for span in self.batch_spans(sequences):
            digest.update(repr(span).encode())
            until = span.start + min(span.length, 64)
            if span.document != EMPTY:
                digest.update(self.tokens(span, span.start, until, 1).tobytes())
        return digest.hexdigest()

    def local(self, spans: list[Span], layout: Layout, rank: int) -> LocalBatch:
        """The tokens that ``rank`` owns, each with the next token of its document as its label.

        Only these are held; where a layout's step is not 1, the bytes between them are read past.
        """
        tokens = np.full(layout.count(rank), self.filler, np.int64)
        labels = np.full_like(tokens, IGNORED)
        first = 0  # the local index of the run's first token
        for run in layout.runs[rank]:
            for span in spans:
                part = run.clip(span.at, span.at + span.length)
                if not part or span.document == EMPTY:
                    continue
                index = first + (part.start - run.start) // run.step
                start, stop = part.start - span.at + span.start, part.stop - span.at + span.start
                own = self.tokens(span, start, stop, run.step)
                following = self.labels(span, start, stop, run.step)
                tokens[index : index + len(own)] = own
                labels[index : index + len(following)] = following
            first += len(run)
        return LocalBatch(tokens, labels)


class Stream(Sequences):
    """Documents in a random order, packed into rows of ``seq_len`` tokens, the rows in a random
    order again; every epoch draws both anew from (seed, epoch).

    ``packing`` "cut": documents are joined and cut; the last row of an epoch is filled up with the
    beginning of the next. "best_fit", "balanced": see :mod:`ringattn.data.packing`.
    """

    def __init__(
        self, documents: Documents, seq_len: int, seed: int | tuple[int, ...],
        packing: str = "cut", filler: int = 0,
    ) -> None:  # fmt: skip
        self.documents, self.seq_len, self.filler = documents, seq_len, filler
        self.seed = (seed,) if isinstance(seed, int) else seed
        self.packing, self.fingerprint = packing, f"{documents.fingerprint}-{packing}"
        self.epoch_tokens = int(documents.lengths.sum())
        self._epoch = lru_cache(2)(self._draw)
        self._packed = lru_cache(2)(self._pack)
        self._starts = [0]  # of epochs, in sequences: each may have another number of rows

    def tokens(self, span: Span, start: int, stop: int, step: int) -> np.ndarray:
        return self.documents.read(span.document, start, stop, step)

    @cached_property
    def rows(self) -> int:
        """Sequences of an epoch (of the first, where documents stay whole)."""
        if self.packing == "cut":
            return -(-self.epoch_tokens // self.seq_len)
        return len(self._packed(0)[0].first) - 1

    @property
    def waste(self) -> float:
        """The share of an epoch's tokens that are filler."""
        if self.packing == "cut":
            return 0.0
        return 1 - self.epoch_tokens / (self.rows * self.seq_len)

    def spans(self, sequence: int) -> list[Span]:
        return self._cut(sequence) if self.packing == "cut" else self._whole(sequence)

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(documents in order, the offset of each one's end, rows in order)."""
        draw = np.random.default_rng([*self.seed, epoch])
        order = draw.permutation(len(self.documents.lengths))
        rows = -(-self.epoch_tokens // self.seq_len)
        return order, np.cumsum(self.documents.lengths[order]), draw.permutation(rows)

    def offset(self, sequence: int) -> int:
        """Where a sequence begins in the endless joined text, in tokens ("cut")."""
        epoch, index = divmod(sequence, self.rows)
        return epoch * self.epoch_tokens + int(self._epoch(epoch)[2][index]) * self.seq_len

    def _cut(self, sequence: int) -> list[Span]:
        spans, at, begin = [], 0, self.offset(sequence)
        while at < self.seq_len:
            epoch, offset = divmod(begin + at, self.epoch_tokens)
            order, ends, _ = self._epoch(epoch)
            index = int(np.searchsorted(ends, offset, side="right"))
            left = int(ends[index]) - offset
            document = int(order[index])
            start = int(self.documents.lengths[document]) - left
            length = min(left, self.seq_len - at)
            spans.append(Span(document, start, length, at))
            at += length
        return spans

    def _pack(self, epoch: int) -> tuple[Rows, np.ndarray]:
        draw = np.random.default_rng([*self.seed, epoch])
        order = draw.permutation(len(self.documents.lengths))
        pack = {"best_fit": best_fit, "balanced": balanced}[self.packing]
        rows = pack(self.documents.lengths, self.seq_len, order)
        return rows, draw.permutation(len(rows.first) - 1)

    def _whole(self, sequence: int) -> list[Span]:
        while self._starts[-1] <= sequence:
            rows = len(self._packed(len(self._starts) - 1)[1])
            self._starts.append(self._starts[-1] + rows)
        epoch = bisect_right(self._starts, sequence) - 1
        rows, order = self._packed(epoch)
        row = int(order[sequence - self._starts[epoch]])
        spans, at = [], 0
        for i in range(int(rows.first[row]), int(rows.first[row + 1])):
            length = int(rows.length[i])
            spans.append(Span(int(rows.document[i]), int(rows.start[i]), length, at))
            at += length
        if at < self.seq_len:
            spans.append(Span(EMPTY, 0, self.seq_len - at, at))
        return spans


class Mixture(Sequences):
    """Several streams, a ``weight`` share of the sequences from each.

    Sequences come in blocks; in every block each source has its share, to within one sequence over
    the whole run, in an order drawn from (seed, block).
    """

    BLOCK = 1024

    def __init__(self, streams: list[Sequences], weights: list[float], seed: int) -> None:
        self.streams, self.seed = streams, seed
        self.seq_len, self.filler = streams[0].seq_len, streams[0].filler
        self.shares = np.array(weights, np.float64) / sum(weights)
        parts = [f"{s.fingerprint}*{w:.12g}" for s, w in zip(streams, self.shares, strict=True)]
        self.fingerprint = "+".join(parts)
        self._counts = [np.zeros(len(streams), np.int64)]  # of each source before every block

    def tokens(self, span: Span, start: int, stop: int, step: int) -> np.ndarray:
        return self.streams[span.source].tokens(span, start, stop, step)

    def labels(self, span: Span, start: int, stop: int, step: int) -> np.ndarray:
        return self.streams[span.source].labels(span, start, stop, step)

    def spans(self, sequence: int) -> list[Span]:
        source, number = self.place(sequence)
        return [replace(span, source=source) for span in self.streams[source].spans(number)]

    def place(self, sequence: int) -> tuple[int, int]:
        """(the source of a sequence, its number in that source's stream)."""
        block, index = divmod(sequence, self.BLOCK)
        while len(self._counts) <= block + 1:
            self._counts.append(self._after(len(self._counts) - 1))
        before = self._counts[block]
        amounts = self._counts[block + 1] - before
        draw = np.random.default_rng([self.seed, block])
        order = draw.permutation(np.repeat(np.arange(len(amounts)), amounts))
        source = int(order[index])
        return source, int(before[source] + (order[:index] == source).sum())

    def _after(self, block: int) -> np.ndarray:
        """Counts after a block: what each source is due, the roundings settled with those that are
        furthest behind or ahead."""
        before, total = self._counts[block], (block + 1) * self.BLOCK
        due = self.shares * total
        counts = np.maximum(np.floor(due).astype(np.int64), before)
        while missing := total - int(counts.sum()):
            ahead = counts - due
            ahead[counts == before] -= np.inf if missing < 0 else 0.0  # these cannot give any
            counts[ahead.argmin() if missing > 0 else ahead.argmax()] += np.sign(missing)
        return counts
