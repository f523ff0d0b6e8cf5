"""Documents shuffled, joined and cut into sequences of equal length: a pure function of the
sequence number, so a stream's position is one integer and any rank reads only its own tokens.
"""

from __future__ import annotations

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

    def local(self, spans: list[Span], layout: Layout, rank: int) -> LocalBatch:
        """The tokens that ``rank`` owns, each with the next token of its document as its label."""
        own = layout.positions(rank)
        tokens, labels = np.zeros_like(own), np.full_like(own, IGNORED)
        for span in spans:
            # Runs ascend, so a rank's part of a span is contiguous in its local order.
            a, e = np.searchsorted(own, [span.at, span.at + span.length])
            if a == e:
                continue
            within = own[a:e] - span.at
            first = span.start + int(within[0])
            text = self.corpus.read(span.document, first, span.start + int(within[-1]) + 2)
            index = within - within[0]
            tokens[a:e] = text[index]
            labelled = index + 1 < len(text)
            labels[a:e][labelled] = text[index[labelled] + 1]
        return LocalBatch(tokens, labels)
