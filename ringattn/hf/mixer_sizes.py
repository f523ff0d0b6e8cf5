"""What the layers of a transformers model without attention do along the sequence, as sizes that a
forecast counts with: read off what such a module hands to the functions that
:mod:`ringattn.hf.mixers` has in place of transformers' own.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from ringattn.hf.attention import ActiveSplit, Probe
from ringattn.hf.coverage import TOKENS, NotCovered
from ringattn.hf.inside import installed
from ringattn.hf.mixers import modules_with_mixers
from ringattn.models.mixer_config import Mixer


def mixer_of(layer: nn.Module, width: int) -> Mixer | None:
    """That of a layer whose parameters may be on the meta device, in a model of this width; None
    where it has no such module. A short convolution counts as over q, k and v of every head,
    whatever the module's own channels are. Raises NotCovered where a module is not heard of."""
    for module in modules_with_mixers(layer):
        calls = _heard(module, width)
        sizes: dict[str, int] = {}
        for name, given in calls:
            sizes |= _SIZES[name](given)
        if sizes:
            return _made(sizes)
    return None


def _heard(module: nn.Module, width: int) -> list[tuple[str, dict[str, Any]]]:
    """What the module gives the functions, on hidden states without memory."""
    probe = Probe({}, calls=[])
    parameters = list(inspect.signature(type(module).forward).parameters.values())[2:]
    needed = {p.name: None for p in parameters
              if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}  # fmt: skip
    with installed(module, ActiveSplit({}, None, "auto", [], probe=probe)):
        try:
            module(torch.empty(1, TOKENS, width, device="meta"), **needed)
        except Exception as error:  # the end of a call; after one, something that needs memory
            if not probe.calls:
                raise NotCovered(
                    f"{type(module).__name__}: what it does along the sequence cannot be read off "
                    f"it: {type(error).__name__}: {error}"
                ) from error
    return probe.calls


def _made(sizes: dict[str, int]) -> Mixer:
    if "mixer" in sizes:
        return Mixer(**{"conv": 1} | {k: v for k, v in sizes.items() if k != "channels"})
    return Mixer(mixer="conv", heads=1, key_dim=1, value_dim=sizes["channels"], conv=sizes["conv"])


def _of_delta(given: dict[str, Any]) -> dict[str, Any]:
    heads, value_dim = given["value"].shape[2:]
    mixer = "kda" if given["g"].dim() == 4 else "gated_delta"
    key_dim = given["key"].shape[-1]
    return {"mixer": mixer, "heads": heads, "key_dim": key_dim, "value_dim": value_dim}


def _of_ssd(given: dict[str, Any]) -> dict[str, Any]:
    heads, value_dim = given["hidden_states"].shape[2:]
    key_dim = given["B"].shape[-1]
    return {"mixer": "ssd", "heads": heads, "key_dim": key_dim, "value_dim": value_dim}


def _of_scan(given: dict[str, Any]) -> dict[str, Any]:
    channels, key_dim = given["A"].shape
    return {"mixer": "scan", "heads": 1, "key_dim": key_dim, "value_dim": channels}


def _of_lightning(given: dict[str, Any]) -> dict[str, Any]:
    dim = given["head_dim"]
    return {"mixer": "lightning", "heads": given["heads"], "key_dim": dim, "value_dim": dim}


def _of_convolution(given: dict[str, Any]) -> dict[str, Any]:
    return {"conv": given["weight"].shape[-1], "channels": given["weight"].shape[0]}


_SIZES = {
    "causal_conv1d_fn": _of_convolution,
    "torch_chunk_gated_delta_rule": _of_delta,
    "chunk_kimi_delta_attention": _of_delta,
    "mamba2_chunk_scan": _of_ssd,
    "mamba_selective_scan": _of_scan,
    "lightning": _of_lightning,
}
