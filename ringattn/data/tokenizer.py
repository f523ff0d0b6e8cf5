"""Text to token ids and back: bytes, or any ``tokenizer.json`` of Hugging Face's tokenizers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ringattn.data.documents import DataError, missing

BYTES = "bytes"
LEAST_BPE = 257
_SPARE = re.compile("unused|reserved")  # in the name of a token that waits for a use
# The end of a document, where a tokenizer does not say it itself.
USUAL_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


@dataclass(frozen=True)
class TokenizerKeys:
    """Which tokenizer, and how it is used: ``data.tokenizer``, ``end``, ``template`` and
    ``special_tokens``."""

    name: str | None = None
    end: str | None = None
    template: bool | None = None
    special_tokens: bool = False


class Tokenizer(Protocol):
    vocab_size: int  # ids are below
    before: list[int]  # what its template puts before the text of a document
    end: int  # the token after a document's last
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """Token ids of the text alone, int64."""

    def document(self, text: str) -> np.ndarray:
        """Token ids of a whole document: what the tokenizer's template puts around the text, and
        ``end`` at the end."""

    def control_tokens(self, text: str) -> int:
        """How often the text spells a control token."""

    def decode(self, ids: Sequence[int]) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes, and 256 at the end of a document."""

    vocab_size, end, fingerprint = 257, 256, BYTES

    def __init__(self) -> None:
        self.before: list[int] = []

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int64)

    def document(self, text: str) -> np.ndarray:
        return np.append(self.encode(text), self.end)

    def control_tokens(self, text: str) -> int:
        return 0

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class FileTokenizer:
    """A ``tokenizer.json``. ``keys.end``: its token after a document, None for the one that
    tokenizer_config.json beside it calls eos_token, or a usual one. ``keys.template``: whether
    documents get what the file's post-processor puts around a text (a beginning, as of Llama 3);
    None: as it says. ``keys.special_tokens``: whether text that spells a control token becomes that
    token; it stays text otherwise. What stands around a document is not put there again where it is
    the very first or last that the text spells. Raises DataError."""

    def __init__(self, path: Path, keys: TokenizerKeys) -> None:
        self.path = path / "tokenizer.json" if path.is_dir() else path
        self._fast, content = _load(self.path)
        # Settings of the file for short inputs; documents are to come whole.
        self._fast.no_truncation()
        self._fast.no_padding()
        self._fast.encode_special_tokens = not keys.special_tokens
        self.vocab_size = max(self._fast.get_vocab(with_added_tokens=True).values()) + 1
        beside = _config(self.path.with_name("tokenizer_config.json"))
        candidates = [keys.end] if keys.end else [*_named(beside, "eos_token"), *USUAL_ENDS]
        ids = [i for i in map(self._fast.token_to_id, candidates) if i is not None]
        if not ids:
            raise DataError(
                f"data.tokenizer={self.path} has no token {' or '.join(candidates)}; "
                "give data.end=TOKEN"
            )
        self.end = ids[0]
        self.before, self._after = self._around(keys.template, beside)
        self._spelled = keys.special_tokens
        used = f"{self.end} {self.before} {self._after} {self._spelled}"
        self.fingerprint = hashlib.sha256(content + used.encode()).hexdigest()[:16]
        control = [t.content for t in self._fast.get_added_tokens_decoder().values() if t.special]
        longest_first = sorted(filter(None, control), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def _around(self, template: bool | None, beside: dict[str, Any]) -> tuple[list[int], list[int]]:
        """What stands before and after the text of a document, ``end`` left out."""
        if template is False:
            return [], []
        bare = self._fast.encode("a", add_special_tokens=False).ids
        framed = self._fast.encode("a", add_special_tokens=True).ids
        places = range(len(framed) - len(bare) + 1)
        at = next((i for i in places if framed[i : i + len(bare)] == bare), None)
        if at is None:
            raise DataError(
                f"data.tokenizer={self.path}: its post-processor changes the text itself; give "
                "data.template=false"
            )
        before, after = framed[:at], framed[at + len(bare) :]
        begins = [self._fast.token_to_id(token) for token in _named(beside, "bos_token")]
        asked = beside.get("add_bos_token")
        if template is None and asked is not None and begins:
            puts = before[:1] == begins
            if puts != asked:
                raise DataError(
                    f"data.tokenizer={self.path} {'puts' if puts else 'does not put'} a token at "
                    f"the beginning of a text, and add_bos_token in tokenizer_config.json is "
                    f"{str(asked).lower()}; give data.template=true (as the tokenizer.json does) "
                    "or false"
                )
        return before, after[:-1] if after[-1:] == [self.end] else after

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._fast.encode(text, add_special_tokens=False).ids, np.int64)

    def document(self, text: str) -> np.ndarray:
        ids = self.encode(text).tolist()
        after = [*self._after, self.end]
        if self._spelled:  # a chat template has written them already: they stand there once
            ids = ids[len(self.before) :] if ids[: len(self.before)] == self.before else ids
            ids = ids[: -len(after)] if ids[-len(after) :] == after else ids
        return np.array([*self.before, *ids, *after], np.int64)

    def control_tokens(self, text: str) -> int:
        return len(self._control.findall(text))

    def decode(self, ids: Sequence[int]) -> str:
        return self._fast.decode(list(ids))


def _config(path: Path) -> dict[str, Any]:
    """A tokenizer_config.json, if there is one."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _named(config: dict[str, Any], key: str) -> list[str]:
    """The token of that name in a tokenizer_config.json, if it says one."""
    token = config.get(key)
    token = token.get("content") if isinstance(token, dict) else token
    return [token] if isinstance(token, str) else []


def _load(path: Path) -> tuple[Any, bytes]:
    """A tokenizer.json, and its bytes. Raises DataError."""
    try:
        from tokenizers import Tokenizer as Fast
    except ImportError:
        raise missing("tokenizers", f"data.tokenizer={path}") from None
    try:
        content = path.read_bytes()
        return Fast.from_str(content.decode()), content
    except OSError as error:
        raise DataError(f"data.tokenizer={path}: {error.strerror}") from None
    except Exception as error:  # tokenizers raises Exception itself
        raise DataError(f"data.tokenizer={path}: not a tokenizer.json: {error}") from None


def tokenizer_file(path: Path) -> Path | None:
    """The tokenizer.json that a path is or has in it."""
    path = path.expanduser()
    if path.is_file() and path.suffix == ".json":
        return path
    return path / "tokenizer.json" if (path / "tokenizer.json").is_file() else None


def other_tokens(ours: Path, theirs: Path) -> str | None:
    """Which tokens of one ``tokenizer.json`` are others in another, None if none are. Control
    tokens, later ones and unused ones may have other names: chats give them a use. Raises DataError
    if one cannot be read."""
    named = []
    for path in (ours, theirs):
        fast, _ = _load(path)
        added = fast.get_added_tokens_decoder().keys()
        vocabulary = fast.get_vocab(with_added_tokens=False).items()
        named.append({i: token for token, i in vocabulary if i not in added})
    own, other = named
    both = {i: (own[i], other[i]) for i in own.keys() & other.keys() if own[i] != other[i]}
    wrong = sorted(i for i, names in both.items() if not any(map(_SPARE.search, names)))
    if not wrong:
        return None
    return f"{len(wrong):,} differ, token {wrong[0]} is {own[wrong[0]]!r} and {other[wrong[0]]!r}"


def make(keys: TokenizerKeys) -> Tokenizer:
    """The tokenizer of ``data.tokenizer``: bytes (or None), a tokenizer.json or its folder."""
    if keys.name in (None, BYTES):
        return ByteTokenizer()
    return FileTokenizer(Path(keys.name).expanduser(), keys)


def train_bpe(texts: Iterable[str], vocab_size: int, out: Path) -> int:
    """Trains a byte-level BPE of ``vocab_size`` tokens, <|endoftext|> among them, and writes it as
    a tokenizer.json; returns the size it reached (less, where the text has no more pairs). Raises
    DataError."""
    try:
        from tokenizers import Tokenizer as Fast
        from tokenizers import decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise missing("tokenizers", "training a tokenizer") from None

    if vocab_size < LEAST_BPE:
        raise DataError(
            f"vocab_size={vocab_size}: bytes and {USUAL_ENDS[0]} are {LEAST_BPE} tokens already"
        )
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
