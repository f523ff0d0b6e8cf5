"""Adapters of low rank in a transformers model, by peft: what is trained is theirs alone, all other
weights are frozen and stay as they are in their folder."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from peft import LoraConfig, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ringattn.hf.coverage import NotCovered
from ringattn.hf.weights import HubWeights
from ringattn.models.hf_weights import index
from ringattn.models.lora_config import Lora

_BLOCKS, _BLOCK = 16, 4096  # of a tensor, and bytes: what a fingerprint reads


def adapt(model: PreTrainedModel, lora: Lora) -> LoraModel:
    """Puts adapters into ``model`` and freezes all else; peft's own handle of it is returned. Their
    weights are not set (see :func:`initial`), and there is no dropout, which would be another one
    for every split.

    Raises NotCovered for a target that no layer has, or that is no linear layer, or is the head,
    whose loss is computed in chunks; and where peft takes other layers than those.
    """
    targets, name = _targets(model, lora), type(model).__name__
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=targets,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on weights that are not there yet
            handle = LoraModel(model, config, "default")
    except ValueError as error:
        raise NotCovered(f"model.lora.targets: {str(error).splitlines()[0]}") from None
    if others := sorted(set(targets) ^ set(adapted(model))):
        raise NotCovered(
            f"model.lora.targets: peft takes names of {name} for its stacked experts, as of "
            f"{others[0]}, which are not covered; name others, as [q_proj,v_proj]"
        )
    return handle


def _targets(model: PreTrainedModel, lora: Lora) -> list[str]:
    """The paths of the layers that get an adapter."""
    name, modules = type(model).__name__, dict(model.named_modules())
    linear = (nn.Linear, Conv1D)
    ends = (model.get_output_embeddings(), model.get_input_embeddings())
    if lora.targets is None:
        return [p for p, m in modules.items() if isinstance(m, linear) and m not in ends]
    found: dict[str, None] = {}
    for target in lora.targets:
        paths = [path for path in modules if path == target or path.endswith(f".{target}")]
        if not paths:
            raise NotCovered(
                f"model.lora.targets: {name} has no layer {target!r} (experts that are stacked in "
                "one weight get no adapters)"
            )
        for path in paths:
            if modules[path] in ends or not isinstance(modules[path], linear):
                raise NotCovered(
                    f"model.lora.targets: {path} is a {type(modules[path]).__name__}; adapters are "
                    "for linear layers, and not for the head"
                )
        found |= dict.fromkeys(paths)
    return list(found)


def adapted(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """The layers with an adapter, by path."""
    modules = model.named_modules()
    return {path: module for path, module in modules if isinstance(module, BaseTunerLayer)}


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is of an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def base_name(name: str) -> str:
    """The name of a frozen parameter in the model without adapters."""
    return name.replace(".base_layer.", ".")


def initial(seed: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The first value of an adapter's parameter, float32 on the host: a function of seed and name
    alone. As in peft: A ``[rank, in]`` uniform within 1 / sqrt(in), B 0."""
    if ".lora_B." in name:
        return torch.zeros(shape)
    number = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "little")
    bound = 1 / math.sqrt(shape[-1])
    generator = torch.Generator().manual_seed(number)
    return torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)


class WithAdapters:
    """A :class:`ringattn.training.checkpoints.states.Source`: frozen weights of a folder and new
    adapters."""

    def __init__(self, base: HubWeights, seed: int) -> None:
        self.base, self.seed = base, seed

    def read(
        self, kind: str, name: str, shape: tuple[int, ...], start: int, count: int
    ) -> torch.Tensor:
        if kind == "weight" and is_adapter(name):
            return initial(self.seed, name, shape).view(-1)[start : start + count]
        return self.base.read(kind, base_name(name), shape, start, count)

    def buffers(self) -> Iterable[tuple[str, torch.Tensor]]:
        return self.base.buffers()


def check_used(model: nn.Module, called: set[nn.Module]) -> None:
    """Raises NotCovered if all adapters of one name stay aside in a forward, in which the modules
    ``called`` were: their layer's weight is used in another way, and they would never be trained.
    (One of several may: an expert to which no token went.)"""
    layers = adapted(model)
    used = {path.rsplit(".", 1)[-1] for path, layer in layers.items() if layer in called}
    for path in layers:
        if path.rsplit(".", 1)[-1] not in used:
            raise NotCovered(
                f"model.lora.targets: {path} is never called by {type(model).__name__}, which uses "
                "its weight in another way: an adapter there would not be trained; leave it out"
            )


def fingerprint(folder: Path) -> str:
    """Stands for the weights of a folder: of every tensor some blocks are hashed, at its beginning,
    its end and between, with the sizes and headers of the files. So a tensor that was trained is
    seen, whichever it is; single rows within a large one that were changed are not."""
    digest = hashlib.sha256()
    for path in sorted(set(index(folder).values())):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for part in _parts(file, size):
                digest.update(part)
    return f"weights {digest.hexdigest()[:16]}"


def _parts(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The header, and the blocks of every tensor, which lie where it says (safetensors)."""
    length = int.from_bytes(file.read(8), "little")
    header = file.read(min(length, size))
    yield header
    for entry in json.loads(header).values():
        begin, end = entry.get("data_offsets", (0, 0))
        last = max(begin, end - _BLOCK)
        for number in range(_BLOCKS if last > begin else 1):
            at = begin + (last - begin) * number // (_BLOCKS - 1)
            file.seek(8 + length + at, os.SEEK_SET)
            yield file.read(min(_BLOCK, end - begin))
