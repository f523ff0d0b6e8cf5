"""Documents shuffled, joined and cut into sequences of equal length: a pure function of the
sequence number, so a stream's position is one integer and any rank reads only its own tokens.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ringattn.context import IGNORED
from ringattn.data.corpus import Corpus
from ringattn.layouts import Layout


@dataclass(frozen=True)
class Span:
    """``length`` tokens of ``document`` from its token ``start``, at ``at`` in a sequence."""

    document: int
    start: int
    length: int
    at: int


@dataclass(frozen=True)
class LocalBatch:
    """One rank's part of a batch: several sequences end to end on one axis. int64 ``[tokens]``."""

    tokens: np.ndarray
    labels: np.ndarray


class Stream:
    """The corpus in a random order of documents, joined and cut into rows of ``seq_len`` tokens,
    the rows in a random order again, endlessly; every epoch draws both anew from (seed, epoch).

    The last row of an epoch is filled up with the beginning of the next.
    """

    def __init__(self, corpus: Corpus, seq_len: int, seed: int) -> None:
        self.corpus, self.seq_len, self.seed = corpus, seq_len, seed
        self.epoch_tokens = int(corpus.lengths.sum())
        self.rows = -(-self.epoch_tokens // seq_len)
        self._epoch = lru_cache(2)(self._draw)

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(documents in order, the offset of each one's end, rows in order)."""
        draw = np.random.default_rng([self.seed, epoch])
        order = draw.permutation(len(self.corpus.names))
        return order, np.cumsum(self.corpus.lengths[order]), draw.permutation(self.rows)

    def offset(self, sequence: int) -> int:
        """Where a sequence begins in the endless joined text, in tokens."""
        epoch, index = divmod(sequence, self.rows)
        return epoch * self.epoch_tokens + int(self._epoch(epoch)[2][index]) * self.seq_len

    def spans(self, sequence: int) -> list[Span]:
        """The pieces of documents that make up a sequence."""
        spans, at, begin = [], 0, self.offset(sequence)
        while at < self.seq_len:
            epoch, offset = divmod(begin + at, self.epoch_tokens)
            order, ends, _ = self._epoch(epoch)
            index = int(np.searchsorted(ends, offset, side="right"))
            left = int(ends[index]) - offset
            document = int(order[index])
            start = self.corpus.sizes[document] + 1 - left
            length = min(left, self.seq_len - at)
            spans.append(Span(document, start, length, at))
            at += length
        return spans

    def batch_spans(self, sequences: list[int]) -> list[Span]:
        """The spans of several sequences laid end to end."""
        return [
            Span(span.document, span.start, span.length, span.at + row * self.seq_len)
            for row, sequence in enumerate(sequences)
            for span in self.spans(sequence)
        ]

    def digest(self, sequences: list[int]) -> str:
        """Stands for the text of ``sequences``: where it is, and the beginning of every piece."""
        digest = hashlib.sha256(self.corpus.fingerprint.encode())
        for span in self.batch_spans(sequences):
            digest.update(repr(span).encode())
            until = span.start + min(span.length, 64)
            digest.update(self.corpus.read(span.document, span.start, until).tobytes())
        return digest.hexdigest()

    def local(self, spans: list[Span], layout: Layout, rank: int) -> LocalBatch:
        """The tokens that ``rank`` owns, each with the next token of its document as its label.

        Only these are held; where a layout's step is not 1, the bytes between them are read past.
        """
        tokens = np.zeros(layout.count(rank), np.int64)
        labels = np.full_like(tokens, IGNORED)
        first = 0  # the local index of the run's first token
        for run in layout.runs[rank]:
            for span in spans:
                part = run.clip(span.at, span.at + span.length)
                if not part:
                    continue
                index = first + (part.start - run.start) // run.step
                start, stop = part.start - span.at + span.start, part.stop - span.at + span.start
                own = self.corpus.read(span.document, start, stop, run.step)
                following = self.corpus.read(span.document, start + 1, stop + 1, run.step)
                tokens[index : index + len(own)] = own
                labels[index : index + len(following)] = following
            first += len(run)
        return LocalBatch(tokens, labels)
