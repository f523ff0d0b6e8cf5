"""What a model that somebody else has trained asks of a run: its tokenizer, and its length."""

from __future__ import annotations

import json
import math
from pathlib import Path

from ringattn.data.tokenizer import BYTES, FileTokenizer, Tokenizer, other_tokens, tokenizer_file
from ringattn.models import hf_config
from ringattn.training.run import TrainingRun
from ringattn.typed import SettingsError


def check_tokenizer(run: TrainingRun, tokenizer: Tokenizer) -> None:
    """Raises SettingsError where the model in model.path has a tokenizer and the data another:
    every loss would look well, and nothing of what the model knows would be used."""
    path = run.model.path
    own = None if path is None else tokenizer_file(Path(path))
    if own is None or run.data.tokenizer == BYTES:
        return
    if not isinstance(tokenizer, FileTokenizer):
        raise SettingsError(
            f"data.tokenizer: text would become bytes, and the model in model.path={path} has a "
            f"tokenizer.json: give data.tokenizer={path} (or bytes, if that is meant)"
        )
    if different := other_tokens(tokenizer.path, own):
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
    made, why = config.get("max_position_embeddings"), "max_position_embeddings of its config.json"
    how = "model.rope.type=yarn model.rope.factor={:g} stretches it"
    if run.model.unchanged:
        how = "a RoPE with rope_type yarn and factor {:g} in its config.json stretches it"
    else:
        own, given = hf_config.read(folder)[0]["rope"], run.model.rope
        if any(getattr(given, key) != own.get(key) for key in ("type", "theta", "factor")):
            if given.factor is None:
                return None  # another theta: how far that reaches is the user's to know
            made = int((given.original_length or made or 0) * given.factor)
            why = "model.rope.original_length x model.rope.factor"
    if not made or run.seq_len <= made:
        return None
    stretch = 2 ** math.ceil(
        math.log2(run.seq_len / (config.get("max_position_embeddings") or made))
    )
    return (
        f"texts of up to {run.seq_len:,} tokens, and the model was made for {made:,} ({why}); "
        + how.format(stretch)
    )
