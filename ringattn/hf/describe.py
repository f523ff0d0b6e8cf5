"""What a transformers config says of a model's sizes and layers, before any weight exists."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ringattn.hf.attention import NAME
from ringattn.hf.coverage import NotCovered
from ringattn.hf.kinds import CHUNK, FULL, WINDOW, covered_types, is_causal, own_band
from ringattn.hf.mixer_sizes import mixer_of
from ringattn.hf.mixers import calls_attention, has_mixers
from ringattn.models.lora_config import Lora

PREFIX = "inner."  # of parameters in :class:`ringattn.hf.trained.SplitModel`


def config_of(folder: Path) -> PretrainedConfig:
    """The config of a folder; nothing is fetched. Raises NotCovered for one that is not read."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of many kinds
        reason = str(error).strip().splitlines()
        raise NotCovered(f"{folder}: {reason[0] if reason else type(error).__name__}") from None


def empty_model(config: PretrainedConfig, weights: bool = False) -> PreTrainedModel:
    """The causal model with our attention, its buffers real and its parameters on the meta device,
    or with ``weights`` real and not yet set. Raises NotCovered where transformers cannot make it.
    """
    options = {"attn_implementation": NAME, "dtype": torch.float32}
    try:
        with torch.device("cpu"), no_init_weights():
            with nullcontext() if weights else init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
            model.tie_weights()
            return model
    except (ValueError, KeyError, AttributeError) as error:
        raise NotCovered(
            f"{config.model_type}: transformers makes no causal model of it with "
            f"attn_implementation={NAME!r}: {type(error).__name__}: {error}"
        ) from None


def sizes(config: PretrainedConfig, lora: Lora | None = None) -> dict[str, Any]:
    """The ``model`` settings that costs are counted with: widths as in the config, parameters as
    they are, adapters among them. Of experts those that a token goes to count as active."""
    text, model = config.get_text_config(), empty_model(config)
    if lora is not None:
        from ringattn.hf.lora import adapt  # here: peft is an extra

        adapt(model, lora)
    total = active = adapters = 0
    experts = next((n for name in ("num_experts", "num_local_experts", "n_routed_experts")
                    if isinstance(n := getattr(text, name, None), int)), None)  # fmt: skip
    chosen = getattr(text, "num_experts_per_tok", None)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    for name, p in model.named_parameters():
        total += p.numel()
        adapters += p.numel() if lora is not None and p.requires_grad else 0
        if p.dim() > 1 and (p is not table.weight or head.weight is table.weight):
            routed = ".experts." in name and experts and chosen
            active += p.numel() * chosen // experts if routed else p.numel()
    heads = getattr(text, "num_attention_heads", None)
    if has_mixers(model) and not any(map(calls_attention, layers_of(model).modules())):
        heads = 1  # nothing is counted with it
    if not isinstance(heads, int):
        raise NotCovered(f"{type(model).__name__}: its config names no attention heads")
    return {
        "dim": text.hidden_size,
        "layers": text.num_hidden_layers,
        "heads": heads,
        "kv_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
        "ffn_dim": getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        "vocab_size": text.vocab_size,
        "tied": head.weight is table.weight,
        "total": total,
        "active": active,
        "adapters": adapters or None,
    }


def masks(config: PretrainedConfig) -> tuple[dict[str, Any], list[str]]:
    """The masks of the model's layers as text, by type, and the type of each layer; for layers
    without attention the keys of :class:`ringattn.models.mixer_config.Mixer`, or "none" where
    tokens do not meet. Layers that attend and carry a state count as the former. Raises NotCovered
    for layers that are not."""
    model = empty_model(config)  # which sets the attention of its config
    name, text = type(model).__name__, model.config.get_text_config()
    types = list(covered_types(model, text))
    if not is_causal(model):
        raise NotCovered(f"{name} attends both ways: it is no causal model")
    if has_mixers(model):
        types = _by_layer(model, types)
    texts: dict[str, Any] = {}
    layers = dict(zip(reversed(types), reversed(layers_of(model)), strict=False))  # the first ones
    for kind in dict.fromkeys(types):
        if kind == CHUNK:
            texts[kind] = f"block_local({text.attention_chunk_size})"
        elif kind in (FULL, WINDOW):
            lo, _ = own_band(text, kind, 2**20)
            texts[kind] = "causal" if lo is None else f"sliding_window({1 - lo})"
        elif has_mixers(model):
            mixer = mixer_of(layers[kind], text.hidden_size)
            texts[kind] = "none" if mixer is None else asdict(mixer)
        else:
            raise NotCovered(f"{name}: layers of type {kind} are not for train.py")
    return texts, types


def _by_layer(model: PreTrainedModel, types: list[str]) -> list[str]:
    """The type of each layer of a model with mixers: whether it attends is seen by whether any of
    its modules calls attention, since such types have many names."""
    layers = layers_of(model)
    if len(types) != len(layers):
        raise NotCovered(f"{type(model).__name__}: {len(layers)} layers, and its config has types "
                         f"of {len(types)}")  # fmt: skip
    known = []
    for kind, layer in zip(types, layers, strict=True):
        attends = any(map(calls_attention, layer.modules()))
        kind = kind if kind not in (FULL, WINDOW, CHUNK) or attends else "no_attention"
        known.append(FULL if attends and kind not in (FULL, WINDOW, CHUNK) else kind)
    return known


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The list of modules that has most parameters."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))
