"""``config.json`` of Hugging Face checkpoints (Llama, Mistral, Qwen 2 and 3) and our settings, both
ways. What such a model has and ours has not is refused, never dropped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NAMES = {
    "dim": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}
ROPE_NAMES = {
    "factor": "factor",
    "original_length": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "attention_factor": "attention_factor",
}
# What each type uses; the rest of a RopeConfig keeps its defaults.
ROPE_USES = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_length", "beta_fast", "beta_slow", "attention_factor"),
    "llama3": ("factor", "original_length", "low_freq_factor", "high_freq_factor"),
}
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


class UnknownModel(ValueError):
    """A folder that holds no model that this decoder can be; the message names the file."""


def read(folder: Path) -> tuple[dict[str, Any], int | None]:
    """The ``model`` settings of a checkpoint folder and its sliding window in tokens, if any.

    Raises UnknownModel, OSError if there is no config.json.
    """
    path = folder / "config.json"
    try:
        return _read(path)
    except (TypeError, AttributeError) as error:
        raise UnknownModel(f"{path}: a value of a wrong type ({error})") from None


def _read(path: Path) -> tuple[dict[str, Any], int | None]:
    try:
        config = json.loads(path.read_text())
        kind = config["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UnknownModel(f"{path}: not a model's config.json ({error})") from None
    if kind not in MODEL_TYPES:
        raise UnknownModel(f"{path}: model_type {kind!r}; legal: {', '.join(MODEL_TYPES)}")
    for key, legal in (
        ("hidden_act", ("silu",)),
        ("mlp_bias", (False, None)),
        ("attention_bias", (False, None)),
        ("attention_dropout", (0, 0.0, None)),
        ("pretraining_tp", (1, None)),
    ):
        if config.get(key, legal[0]) not in legal:
            raise UnknownModel(f"{path}: {key}={config[key]!r}; this decoder has {legal[0]!r} only")
    defaults = {
        "head_dim": config.get("hidden_size", 0) // max(config.get("num_attention_heads", 1), 1),
        "num_key_value_heads": config.get("num_attention_heads"),
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
    }
    if kind == "qwen3":
        defaults["head_dim"] = 128
    model: dict[str, Any] = {}
    for ours, theirs in NAMES.items():
        value = config.get(theirs)
        value = defaults.get(theirs) if value is None else value
        if value is None:
            raise UnknownModel(f"{path}: {theirs} is missing")
        model[ours] = value
    model["qkv_bias"], model["qk_norm"] = kind == "qwen2", kind == "qwen3"
    model["rope"] = _rope(path, config)
    return model, _window(path, config)


def _rope(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Both spellings: ``rope_parameters`` (transformers 5), or ``rope_theta`` and
    ``rope_scaling``."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_USES:
        raise UnknownModel(
            f"{path}: RoPE of type {kind!r}; legal: {', '.join(ROPE_USES)} (dynamic is "
            "model.rope.type=ntk here, with the factor of the length you train on)"
        )
    for key in ("mscale", "mscale_all_dim"):
        if scaling.get(key):
            raise UnknownModel(f"{path}: {key} is not supported; give model.rope.attention_factor")
    if scaling.get("truncate") is False:
        raise UnknownModel(f"{path}: truncate=false is not supported")
    rope = {"type": kind, "theta": scaling.get("rope_theta", config.get("rope_theta", 10000.0))}
    if config.get("partial_rotary_factor", scaling.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UnknownModel(f"{path}: partial_rotary_factor is not supported")
    for ours in ROPE_USES[kind]:
        if (value := scaling.get(ROPE_NAMES[ours])) is not None:
            rope[ours] = value
    # What an extension starts from, if one is asked for.
    rope.setdefault("original_length", config.get("max_position_embeddings"))
    return rope


def _window(path: Path, config: dict[str, Any]) -> int | None:
    usual = 4096 if config["model_type"] == "mistral" else None
    window = config.get("sliding_window", usual)
    if window is None or config.get("use_sliding_window") is False:
        return None
    layers = config["num_hidden_layers"]
    kinds = config.get("layer_types")
    if kinds is None and config["model_type"] in ("qwen2", "qwen3"):
        first = config.get("max_window_layers", 28)
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    sliding = sum(kind == "sliding_attention" for kind in kinds or ["sliding_attention"] * layers)
    if sliding not in (0, layers):
        raise UnknownModel(
            f"{path}: {sliding} of {layers} layers have a window; all layers share one mask here"
        )
    return window if sliding else None


def write(folder: Path, model: dict[str, Any], window: int | None, length: int, dtype: str) -> None:
    """The config.json of a model with our settings, trained on ``length`` tokens."""
    kind = "qwen3" if model["qk_norm"] else "qwen2" if model["qkv_bias"] else "llama"
    if window is not None and kind == "llama":
        kind = "mistral"
    rope = model["rope"]
    if rope["type"] == "ntk":  # the same as another theta
        stretched = rope["factor"] ** (model["head_dim"] / max(model["head_dim"] - 2, 1))
        rope = {"type": "default", "theta": rope["theta"] * stretched}
    scaling = {ROPE_NAMES[key]: rope.get(key) for key in ROPE_USES[rope["type"]]}
    scaling = {key: value for key, value in scaling.items() if value is not None}
    classes = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    content = {
        "architectures": [f"{classes[kind]}ForCausalLM"],
        "model_type": kind,
        **{theirs: model[ours] for ours, theirs in NAMES.items()},
        "hidden_act": "silu",
        "max_position_embeddings": length,
        "rope_theta": rope["theta"],
        "rope_scaling": {"rope_type": rope["type"], **scaling} if scaling else None,
        "sliding_window": window,
        "torch_dtype": dtype,
    }
    if kind.startswith("qwen"):
        content |= {"use_sliding_window": window is not None, "max_window_layers": 0}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
