"""``config.json`` of Hugging Face checkpoints and our settings, both ways. What such a model has
and ours has not is refused, never dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ringattn.models.sizes import ModelConfig
from ringattn.planning.layer_plans import ONE

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
LOCAL, GLOBAL = "local", "global"  # kinds of layer: with a window, and without
_TYPES = {LOCAL: "sliding_attention", GLOBAL: "full_attention"}


@dataclass(frozen=True)
class Family:
    """A ``model_type``: its class, what its decoder is (settings that are not sizes), keys that its
    config.json may leave out, every how many layers one is global (0: as ``layer_types`` or
    ``max_window_layers`` say), and whether its kinds of layer have RoPE settings of their own."""

    name: str
    features: dict[str, Any] = field(default_factory=dict)
    usual: dict[str, Any] = field(default_factory=dict)
    every: int = 0
    rope_by_kind: bool = False


_GEMMA = {
    "norms": "sandwich",
    "norm_offset": True,
    "activation": "gelu_tanh",
    "embed_scale": True,
}
_GEMMA_USUAL = {
    "head_dim": 256, "tie_word_embeddings": True, "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}  # fmt: skip
FAMILIES = {
    "llama": Family("Llama"),
    "mistral": Family("Mistral", usual={"sliding_window": 4096}),
    "qwen2": Family("Qwen2", {"qkv_bias": True}),
    "qwen3": Family("Qwen3", {"qk_norm": True}, {"head_dim": 128}),
    "gemma2": Family(
        "Gemma2",
        _GEMMA,
        _GEMMA_USUAL | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        every=2,
    ),
    "gemma3_text": Family(
        "Gemma3", _GEMMA | {"qk_norm": True}, _GEMMA_USUAL, every=6, rope_by_kind=True
    ),
    "olmo3": Family(
        "Olmo3",
        {"norms": "post", "qk_norm_whole": True},
        {"sliding_window": 4096, "rope_theta": 500000.0, "rms_norm_eps": 1e-5},
        every=4,
        rope_by_kind=True,
    ),
}
_FEATURES = ("qkv_bias", "qk_norm", "qk_norm_whole", *_GEMMA, "sinks")


class UnknownModel(ValueError):
    """A folder that holds no model that this decoder can be; the message names the file."""


@dataclass(frozen=True)
class Layers:
    """The masks of a model's layers, as text by kind of layer: none if all are causal, one for all,
    or two and the ``pattern`` that the kinds follow."""

    masks: dict[str, Any] = field(default_factory=dict)
    pattern: list[str] = field(default_factory=list)

    @property
    def window(self) -> int | None:
        """Of all layers."""
        return None if self.pattern or not self.masks else window_of(self.masks[ONE])

    @property
    def said(self) -> str:
        kinds = ", ".join(f"{kind} {mask}" for kind, mask in self.masks.items())
        return f"layers of two kinds ({kinds})" if self.pattern else f"the mask {self.masks[ONE]}"


def window_of(mask: str) -> int | None:
    """The window of a mask that is nothing else."""
    found = re.fullmatch(r"\s*sliding_window\((\d+)\)\s*", mask)
    return int(found[1]) if found else None


def read(folder: Path) -> tuple[dict[str, Any], Layers]:
    """The ``model`` settings of a checkpoint folder and the masks of its layers.

    Raises UnknownModel, OSError if there is no config.json.
    """
    path = folder / "config.json"
    try:
        return _read(path)
    except (TypeError, AttributeError) as error:
        raise UnknownModel(f"{path}: a value of a wrong type ({error})") from None


def _read(path: Path) -> tuple[dict[str, Any], Layers]:
    try:
        config = json.loads(path.read_text())
        kind = config["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UnknownModel(f"{path}: not a model's config.json ({error})") from None
    if kind not in FAMILIES:
        raise UnknownModel(
            f"{path}: model_type {kind!r}; legal: {', '.join(FAMILIES)} (any other: "
            "model=transformers)"
        )
    family = FAMILIES[kind]
    config = family.usual | config
    act = ("gelu_pytorch_tanh",) if "activation" in family.features else ("silu",)
    for key, legal in (
        ("hidden_act", act if "hidden_activation" not in config else (config.get("hidden_act"),)),
        ("hidden_activation", act),
        ("mlp_bias", (False, None)),
        ("attention_bias", (False, None)),
        ("attention_dropout", (0, 0.0, None)),
        ("pretraining_tp", (1, None)),
        ("use_bidirectional_attention", (False, None)),
    ):
        if config.get(key, legal[0]) not in legal:
            raise UnknownModel(f"{path}: {key}={config[key]!r}; this decoder has {legal[0]!r} only")
    defaults = {
        "head_dim": config.get("hidden_size", 0) // max(config.get("num_attention_heads", 1), 1),
        "num_key_value_heads": config.get("num_attention_heads"),
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
    }
    usual = {f.name: _default(f) for f in fields(ModelConfig)}
    model: dict[str, Any] = {name: usual[name] for name in (*_FEATURES, "rope_kinds")}
    for ours, theirs in NAMES.items():
        value = config.get(theirs)
        value = defaults.get(theirs) if value is None else value
        if value is None:
            raise UnknownModel(f"{path}: {theirs} is missing")
        model[ours] = value
    model |= family.features
    scalar = config.get("query_pre_attn_scalar")
    model["scale"] = None if scalar in (None, model["head_dim"]) else float(scalar) ** -0.5
    model["softcap"] = config.get("attn_logit_softcapping")
    model["logit_softcap"] = config.get("final_logit_softcapping")
    layers = _layers(path, config, family)
    model |= _ropes(path, config, family, layers)
    return model, layers


def _default(f: Any) -> Any:
    """Of a field; None where it must be given."""
    value = ModelConfig.__pydantic_fields__[f.name]
    return None if value.is_required() else value.get_default(call_default_factory=True)


def _ropes(path: Path, config: dict[str, Any], family: Family, layers: Layers) -> dict[str, Any]:
    """RoPE of all layers, or of the global ones and of the local ones."""
    parameters = config.get("rope_parameters") or {}
    if not family.rope_by_kind:
        return {"rope": _rope(path, config, parameters or config.get("rope_scaling") or {})}
    # Both spellings: by type of layer (transformers 5), or with keys of their own.
    whole = dict(parameters.get(_TYPES[GLOBAL]) or config.get("rope_scaling") or {})
    near = dict(parameters.get(_TYPES[LOCAL]) or {})
    if family.name == "Gemma3":
        whole.setdefault("rope_theta", config.get("rope_theta", 1e6))
        near.setdefault("rope_theta", config.get("rope_local_base_freq", 1e4))
    ropes = [_rope(path, config, each) for each in (whole, near)]
    if not layers.pattern and layers.masks:
        return {"rope": ropes[1]}
    same = ropes[0] == ropes[1] or not layers.pattern
    return {"rope": ropes[0], "rope_kinds": None if same else {LOCAL: ropes[1]}}


def _rope(path: Path, config: dict[str, Any], scaling: dict[str, Any]) -> dict[str, Any]:
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
    theta = float(scaling.get("rope_theta", config.get("rope_theta", 10000.0)))
    rope = {"type": kind, "theta": theta}
    if config.get("partial_rotary_factor", scaling.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UnknownModel(f"{path}: partial_rotary_factor is not supported")
    for ours in ROPE_USES[kind]:
        if (value := scaling.get(ROPE_NAMES[ours])) is not None:
            rope[ours] = value
    # What an extension starts from, if one is asked for.
    rope.setdefault("original_length", config.get("max_position_embeddings"))
    return rope


def _layers(path: Path, config: dict[str, Any], family: Family) -> Layers:
    window, count = config.get("sliding_window"), config["num_hidden_layers"]
    if window is None or config.get("use_sliding_window") is False:
        return Layers()
    types = config.get("layer_types")
    if types is None and family.every:
        every = config.get("sliding_window_pattern", family.every)
        types = [_TYPES[GLOBAL if (i + 1) % every == 0 else LOCAL] for i in range(count)]
    if types is None and family.name in ("Qwen2", "Qwen3"):
        first = config.get("max_window_layers", 28)
        types = [_TYPES[LOCAL if i >= first else GLOBAL] for i in range(count)]
    types = types or [_TYPES[LOCAL]] * count
    kinds = {theirs: ours for ours, theirs in _TYPES.items()}
    if unknown := sorted(set(types) - set(kinds)):
        raise UnknownModel(f"{path}: layers of type {', '.join(unknown)} are not supported")
    if len(types) != count:
        raise UnknownModel(f"{path}: {len(types)} layer_types for {count} layers")
    pattern = [kinds[each] for each in types]
    mask = f"sliding_window({window})"
    if len(set(pattern)) < 2:
        return Layers({ONE: mask} if pattern[0] == LOCAL else {})
    return Layers({LOCAL: mask, GLOBAL: "causal"}, shortest(pattern))


def shortest(pattern: list[str]) -> list[str]:
    """What, again and again, gives the pattern."""
    return next(
        pattern[:period]
        for period in range(1, len(pattern) + 1)
        if all(kind == pattern[i % period] for i, kind in enumerate(pattern))
    )


def family_of(model: dict[str, Any], masks: Sequence[str]) -> str:
    """The ``model_type`` of a model of ours whose layers have these masks, in order. Raises
    UnknownModel where no family has it."""
    windows = {window_of(mask) for mask in masks}
    if odd := [mask for mask in masks if window_of(mask) is None and mask != "causal"]:
        raise UnknownModel(f"the mask {odd[0]!r} has no place in a Hugging Face config")
    if len(windows - {None}) > 1:
        raise UnknownModel("windows of several sizes have no place in a Hugging Face config")
    usual = {f.name: _default(f) for f in fields(ModelConfig)}
    features = {name: model[name] for name in _FEATURES if model[name] != usual[name]}
    names = [name for name, family in FAMILIES.items() if family.features == features]
    if not names:
        raise UnknownModel(
            "no Hugging Face family has "
            + ", ".join(f"model.{name}={value}" for name, value in features.items())
            + (" alone" if len(features) == 1 else " together")
        )
    if names == ["llama", "mistral"]:
        names = ["mistral"] if windows - {None} else ["llama"]
    family = FAMILIES[names[0]]
    if len(windows) > 1 and not (family.every or family.name in ("Qwen2", "Qwen3")):
        raise UnknownModel(f"layers of {family.name} have one mask, and these have two")
    capped = [name for name in ("softcap", "logit_softcap", "scale") if model[name] is not None]
    if capped and not names[0].startswith("gemma"):
        raise UnknownModel(f"model.{capped[0]} has no place in a config of {family.name}")
    if model["rope_kinds"] and not family.rope_by_kind:
        raise UnknownModel(f"model.rope_kinds has no place in a config of {family.name}")
    return names[0]


def write(
    folder: Path,
    model: dict[str, Any],
    masks: Sequence[str],
    kinds: Sequence[str],
    length: int,
    dtype: str,
) -> None:
    """The config.json of a model with our settings, whose layers are of these kinds and have these
    masks, trained on ``length`` tokens. Raises UnknownModel where no family has it."""
    kind = family_of(model, masks)
    family = FAMILIES[kind]
    window = next((w for mask in masks if (w := window_of(mask)) is not None), None)
    types = [_TYPES[GLOBAL if window_of(mask) is None else LOCAL] for mask in masks]
    content = {
        "architectures": [f"{family.name}ForCausalLM"],
        "model_type": kind,
        **{theirs: model[ours] for ours, theirs in NAMES.items()},
        "hidden_act": "silu",
        "max_position_embeddings": length,
        "sliding_window": window,
        "torch_dtype": dtype,
    }
    if kind.startswith("gemma"):
        del content["hidden_act"]
        scale = model["scale"]
        content |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": model["head_dim"] if scale is None else round(scale**-2),
            "attn_logit_softcapping": model["softcap"],
            "final_logit_softcapping": model["logit_softcap"],
        }
    if kind.startswith("qwen"):
        content |= {"use_sliding_window": window is not None, "max_window_layers": 0}
    if family.every or (kind.startswith("qwen") and len(set(types)) > 1):
        content["layer_types"] = types
        if window is None:  # such families always have one
            content["sliding_window"] = length
    theta, scaling = _written(model["rope"], model["head_dim"])
    if family.rope_by_kind:
        local = next((k for k, t in zip(kinds, types, strict=True) if t == _TYPES[LOCAL]), None)
        near = (model["rope_kinds"] or {}).get(local, model["rope"])
        near = _written(near, model["head_dim"])
        content["rope_parameters"] = {
            _TYPES[place]: {"rope_type": "default", "rope_theta": base, **more}
            for place, (base, more) in ((GLOBAL, (theta, scaling)), (LOCAL, near))
        }
    else:
        content |= {"rope_theta": theta, "rope_scaling": scaling or None}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")


def _written(rope: dict[str, Any], head_dim: int) -> tuple[float, dict[str, Any]]:
    """theta, and what scales it, as config.json has them."""
    if rope["type"] == "ntk":  # the same as another theta
        return rope["theta"] * rope["factor"] ** (head_dim / max(head_dim - 2, 1)), {}
    scaling = {ROPE_NAMES[key]: rope.get(key) for key in ROPE_USES[rope["type"]]}
    scaling = {key: value for key, value in scaling.items() if value is not None}
    return rope["theta"], {"rope_type": rope["type"], **scaling} if scaling else {}
