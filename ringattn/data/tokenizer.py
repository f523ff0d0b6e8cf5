"""Text to token ids and back: bytes, or any ``tokenizer.json`` of Hugging Face's tokenizers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ringattn.data.documents import DataError, missing

BYTES = "bytes"
# The end of a document, where a tokenizer does not say it itself.
USUAL_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


class Tokenizer(Protocol):
    vocab_size: int  # ids are below
    end: int  # the token after a document's last
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int64, without any that frame the text."""

    def decode(self, ids: Sequence[int]) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes, and 256 at the end of a document."""

    vocab_size, end, fingerprint = 257, 256, BYTES

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class FileTokenizer:
    """A ``tokenizer.json``; ``end``: its token after a document, None for the one that
    tokenizer_config.json beside it calls eos_token, or a usual one. Raises DataError."""

    def __init__(self, path: Path, end: str | None = None) -> None:
        try:
            from tokenizers import Tokenizer as Fast
        except ImportError:
            raise missing("tokenizers", f"data.tokenizer={path}") from None
        self.path = path / "tokenizer.json" if path.is_dir() else path
        try:
            content = self.path.read_bytes()
            self._fast = Fast.from_str(content.decode())
        except OSError as error:
            raise DataError(f"data.tokenizer={path}: {error.strerror}") from None
        except Exception as error:  # tokenizers raises Exception itself
            raise DataError(f"data.tokenizer={self.path}: not a tokenizer.json: {error}") from None
        # Settings of the file for short inputs; documents are to come whole.
        self._fast.no_truncation()
        self._fast.no_padding()
        self.vocab_size = max(self._fast.get_vocab(with_added_tokens=True).values()) + 1
        candidates = (
            [end]
            if end
            else [*_end_token(self.path.with_name("tokenizer_config.json")), *USUAL_ENDS]
        )
        ids = [i for i in map(self._fast.token_to_id, candidates) if i is not None]
        if not ids:
            raise DataError(
                f"data.tokenizer={self.path} has no token {' or '.join(candidates)}; "
                "give data.end=TOKEN"
            )
        self.end = ids[0]
        self.fingerprint = hashlib.sha256(content + bytes(str(self.end), "ascii")).hexdigest()[:16]

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._fast.encode(text, add_special_tokens=False).ids, np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        return self._fast.decode(list(ids))


def _end_token(path: Path) -> list[str]:
    """The eos_token of a tokenizer_config.json, if there is one."""
    try:
        token: Any = json.loads(path.read_text()).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return []
    token = token.get("content") if isinstance(token, dict) else token
    return [token] if isinstance(token, str) else []


def make(name: str | None, end: str | None = None) -> Tokenizer:
    """The tokenizer of ``data.tokenizer``: bytes (or None), a tokenizer.json or its folder."""
    if name in (None, BYTES):
        return ByteTokenizer()
    return FileTokenizer(Path(name).expanduser(), end)


def train_bpe(texts: Iterable[str], vocab_size: int, out: Path) -> int:
    """Trains a byte-level BPE of ``vocab_size`` tokens, <|endoftext|> among them, and writes it as
    a tokenizer.json; returns the size it reached (less, where the text has no more pairs)."""
    try:
        from tokenizers import Tokenizer as Fast
        from tokenizers import decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise missing("tokenizers", "training a tokenizer") from None

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[USUAL_ENDS[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(texts, trainer)
    out.parent.mkdir(parents=True, exist_ok=True)
    fast.save(str(out))
    return fast.get_vocab_size()
