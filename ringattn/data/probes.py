"""Tasks that need the context, made on the fly: passkey retrieval (Mohtashami & Jaggi 2023) and
multi-query associative recall (Arora et al. 2023), with what is asked for at a chosen depth.

Only the answer is supervised, so accuracy and loss are those of retrieval.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

from ringattn.batches import IGNORED
from ringattn.data.documents import DataError
from ringattn.data.stream import EMPTY, Sequences, Span
from ringattn.data.tokenizer import Tokenizer

HAYSTACK = "The grass is green. The sky is blue. The sun is yellow. Here we go. "
NEEDLE = "The pass key is {0}. Remember it. {0} is the pass key. "
QUESTION = "What is the pass key? The pass key is "
DIGITS = 5
PAIRS = 8  # of recall; each is asked for once


class Probe(Sequences):
    """Numbered sequences of one task, each drawn from (seed, number).

    ``depth`` is where what is asked for stands: 0 at the beginning, 1 right before the question,
    None anywhere. ``halvings``: sequences take turns in being one text, two of half the length...
    down to as many halvings, or to what the task needs: to train on, since the short ones teach
    the long ones. Raises DataError if ``seq_len`` is too short for the task.
    """

    def __init__(
        self, task: str, tokenizer: Tokenizer, seq_len: int, seed: int,
        depth: float | None = None, halvings: int = 0,
    ) -> None:  # fmt: skip
        self.task, self.tokenizer, self.seq_len = task, tokenizer, seq_len
        self.seed, self.depth, self.filler = seed, depth, tokenizer.end
        self._made = lru_cache(64)(self._make)
        self._encoded = lru_cache(8)(tokenizer.encode)
        self._before = np.array(tokenizer.before, np.int64)
        least = len(self._before) + sum(map(len, self._parts(0)[:2]))
        if seq_len < least:
            raise DataError(f"{task} of {seq_len} tokens: it takes at least {least}")
        self.kinds = [1 << i for i in range(halvings + 1) if seq_len >> i >= least]
        about = f"{task} {tokenizer.fingerprint} {seed} {depth} {self.kinds}"
        self.fingerprint = hashlib.sha256(about.encode()).hexdigest()[:16]

    def spans(self, sequence: int) -> list[Span]:
        texts = self.kinds[sequence % len(self.kinds)]
        length = self.seq_len // texts
        first = sequence * self.kinds[-1]
        spans = [Span(first + i, 0, length, i * length) for i in range(texts)]
        if left := self.seq_len - texts * length:
            spans.append(Span(EMPTY, 0, left, texts * length))
        return spans

    def tokens(self, span: Span, start: int, stop: int, step: int) -> np.ndarray:
        return self._made(span.document)[0][start:stop:step]

    def labels(self, span: Span, start: int, stop: int, step: int) -> np.ndarray:
        return self._made(span.document)[1][start:stop:step]

    def _make(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, labels) of one text, int64."""
        sequence = number // self.kinds[-1]
        length = self.seq_len // self.kinds[sequence % len(self.kinds)]
        for attempt in range(100):  # with some tokenizers, keys differ in length
            needle, question, asked, depth = self._parts(number, attempt)
            if (room := length - len(self._before) - len(needle) - len(question)) >= 0:
                break
        else:
            raise DataError(f"{self.task} of {length} tokens: that is too short for most keys")
        # The haystack begins anywhere in its turn, so that places say nothing; what is asked for
        # stands where a turn begins: each as likely, the first and the last too.
        turn = self._encoded(HAYSTACK)
        first = min(int(np.random.default_rng([self.seed, number]).integers(len(turn))), room)
        places = (room - first) // len(turn)
        before = first + min(int(depth * (places + 1)), places) * len(turn)
        hay = np.resize(np.roll(turn, first), room)
        tokens = np.concatenate([self._before, hay[:before], needle, hay[before:], question])
        labels = np.full(length, IGNORED, np.int64)
        answers = length - len(question) + np.flatnonzero(asked)
        labels[answers - 1] = tokens[answers]
        return tokens, labels

    def _parts(
        self, number: int, attempt: int = 0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        """(what is to be found, the question with its answers, which of that is asked, depth)."""
        draw = np.random.default_rng([self.seed, number, attempt])
        depth = draw.random() if self.depth is None else self.depth
        return *(self._passkey if self.task == "passkey" else self._recall)(draw), depth

    def _passkey(self, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        key = "".join(map(str, draw.integers(0, 10, DIGITS)))
        encode = self.tokenizer.encode
        question, answer = self._encoded(QUESTION), encode(key)
        asked = np.repeat([False, True], [len(question), len(answer)])
        return encode(NEEDLE.format(key)), np.concatenate([question, answer]), asked

    def _recall(self, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """PAIRS of (key, value), then every key again in another order with its value asked for.
        Keys and values are token ids: two halves of the vocabulary without the haystack's."""
        used = {*self._encoded(HAYSTACK).tolist(), self.tokenizer.end}
        free = np.array([i for i in range(min(self.tokenizer.vocab_size, 512)) if i not in used])
        if len(free) < 2 * PAIRS:
            raise DataError(f"recall needs a vocabulary with {2 * PAIRS} tokens to spare")
        keys = draw.permutation(free[: len(free) // 2])[:PAIRS]
        values = draw.choice(free[len(free) // 2 :], PAIRS)
        order = draw.permutation(PAIRS)
        pairs = np.stack([keys, values], 1)
        return pairs.ravel(), pairs[order].ravel(), np.tile([False, True], PAIRS)
