"""What a model that somebody else has trained asks of a run: its tokenizer, and its length."""

from __future__ import annotations

import json
import math
from pathlib import Path

from ringattn.data.records import has_file
from ringattn.data.shards import MANIFEST
from ringattn.data.tokenizer import BYTES, FileTokenizer, Tokenizer, other_tokens, tokenizer_file
from ringattn.models import hf_config
from ringattn.training.run import TrainingRun
from ringattn.typed import SettingsError


def check_keys(run: TrainingRun) -> None:
    """Raises SettingsError for what :func:`check_tokenizer` would, as far as the keys say it:
    before text is tokenized for hours."""
    own = _own(run)
    if own is None:
        return
    if run.data.tokenizer is not None:
        if named := tokenizer_file(Path(run.data.tokenizer)):  # if not, opening it says so
            _compare(run, named, own)
        return
    roots = [part.root for part in run.data.mix or [run.data] if part.root is not None]
    there = all(Path(root).expanduser().exists() for root in roots)
    shards = run.data.format == "tokens" or any(has_file(root, MANIFEST) for root in roots)
    if there and not shards:
        raise _bytes(run)


def check_tokenizer(run: TrainingRun, tokenizer: Tokenizer) -> None:
    """Raises SettingsError where the model in model.path has a tokenizer and the data another:
    every loss would look well, and nothing of what the model knows would be used. What
    data.tokenizer names :func:`check_keys` has compared."""
    own = _own(run)
    if own is None or run.data.tokenizer is not None:
        return
    if not isinstance(tokenizer, FileTokenizer):
        raise _bytes(run)
    _compare(run, tokenizer.path, own)


def _own(run: TrainingRun) -> Path | None:
    """The model's tokenizer.json, unless bytes are asked for."""
    path = run.model.path
    return None if path is None or run.data.tokenizer == BYTES else tokenizer_file(Path(path))


def _bytes(run: TrainingRun) -> SettingsError:
    path = run.model.path
    return SettingsError(
        f"data.tokenizer: the data is bytes, and the model in model.path={path} has a "
        f"tokenizer.json: give data.tokenizer={path}, or tokenize again what is token shards (or "
        "data.tokenizer=bytes, if that is meant)"
    )


def _compare(run: TrainingRun, ours: Path, own: Path) -> None:
    if different := other_tokens(ours, own):
        path = run.model.path
        raise SettingsError(
            f"data.tokenizer: the data's tokens are not those of the model in model.path={path}: "
            f"{different}; tokenize it with tokenizer={path}, or take {own} away if the model is "
            "to learn other tokens"
        )


def beyond(run: TrainingRun) -> str | None:
    """What to say where texts may be longer than the model in model.path was made for, by its
    config.json or by the RoPE that is given for it."""
    path = run.model.path
    if path is None:
        return None
    folder = Path(path).expanduser()
    config = json.loads((folder / "config.json").read_text())
    config = config.get("text_config", config)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = rope.get("full_attention", rope)  # where kinds of layers have their own
    trained = config.get("max_position_embeddings")
    if not trained:
        return None
    made, why = trained, "max_position_embeddings of its config.json"
    # Without an original length the other one is as often the stretched length as not.
    original = rope.get("original_max_position_embeddings")
    if original and (stretched := int(original * (rope.get("factor") or 1))) > made:
        made, why = stretched, "the RoPE of its config.json"
    original = original or trained
    if not run.model.unchanged:
        own, given = hf_config.read(folder)[0]["rope"], run.model.rope
        original = given.original_length or original
        if (given.type, given.factor) != (own["type"], own.get("factor")):
            made = int(original * (given.factor or 1))
            why = "model.rope.original_length x model.rope.factor"
        elif given.theta != own["theta"]:
            return None  # how far that reaches is the user's to know
    if run.seq_len <= made:
        return None
    said = f"texts of up to {run.seq_len:,} tokens, and the model was made for {made:,} ({why})"
    factor = 2 ** math.ceil(math.log2(run.seq_len / original))
    if not run.model.unchanged:
        return said + (
            f"; model.rope.type=yarn model.rope.original_length={original} "
            f"model.rope.factor={factor} stretches it"
        )
    if rope or "rope_theta" in config:
        said += f"; a RoPE with rope_type yarn and factor {factor} in its config.json stretches it"
    return said
