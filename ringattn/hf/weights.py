"""Weights of a Hugging Face folder as the parameters of a transformers module, read run by run, so
that no process holds more than its own part and one tensor.

transformers may name and lay out weights otherwise in a module than in files (experts are stacked,
for one): its own conversions are applied, expert by expert where they stack.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter

from ringattn.models.hf_config import UnknownModel
from ringattn.models.hf_weights import index, refuse_others, run_of, slice_of


@dataclass
class _Target:
    """How one parameter is made: of ``keys`` of the files, by source pattern, with a converter or
    as they are."""

    converter: WeightConverter | None = None
    keys: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def stacked(self) -> bool:
        """Whether rows of the first axis are made of files of their own."""
        operations = self.converter.operations if self.converter else []
        return bool(operations) and type(operations[0]) is MergeModulelist and not operations[0].dim


class HubWeights:
    """A :class:`ringattn.training.checkpoints.states.Source`: the weights of ``folder`` for
    ``model``, which has its parameters on the meta device.

    Raises UnknownModel if the folder has no safetensors, or lacks weights, or has others.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, prefix: str = "") -> None:
        self.folder, self.prefix, self.files = folder, prefix, index(folder)
        self.model = model
        tensors = dict(model.named_parameters()) | _persistent(model)
        transforms = get_model_conversion_mapping(model)
        self.targets: dict[str, _Target] = defaultdict(_Target)
        extra = []
        for key in sorted(self.files, key=_by_number):
            name, converter, pattern = self._renamed(key, transforms, tensors)
            if name in tensors:
                self.targets[name].converter = converter
                self.targets[name].keys[pattern].append(key)
            elif not _known_extra(model, name):
                extra.append(key)
        refuse_others(folder, set(tensors) - set(self.targets), extra)
        for name, tensor in tensors.items():
            target = self.targets[name]
            stored = self._shape(target)
            if stored is not None and stored != tuple(tensor.shape):
                raise UnknownModel(f"{folder}: {name} is {stored}, not {tuple(tensor.shape)}")

    def read(
        self, kind: str, name: str, shape: tuple[int, ...], start: int, count: int
    ) -> torch.Tensor:
        if kind != "weight":
            return torch.zeros(count)
        target = self.targets[name.removeprefix(self.prefix)]

        def rows(first: int, last: int) -> torch.Tensor:
            if target.converter is None:
                ((key,),) = target.keys.values()
                return slice_of(self.files[key], key)[first:last]
            if target.stacked:
                return torch.cat([self._converted(target, name, i) for i in range(first, last)])
            return self._converted(target, name)[first:last]

        return run_of(shape, start, count, rows)

    def buffers(self) -> Iterable[tuple[str, torch.Tensor]]:
        """The buffers that the files have, by their names in the model, as they are stored."""
        for name in _persistent(self.model):
            ((key,),) = self.targets[name].keys.values()
            yield name, slice_of(self.files[key], key)[:]

    def _converted(self, target: _Target, name: str, at: int | None = None) -> torch.Tensor:
        """The parameter, or the row ``at`` of a stacked one, float32."""
        values: dict[str, Any] = {
            pattern: [
                slice_of(self.files[key], key)[:].float()
                for key in (keys if at is None else keys[at : at + 1])
            ]
            for pattern, keys in target.keys.items()
        }
        converter = target.converter
        for operation in converter.operations:
            values = operation.convert(
                values,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
                full_layer_name=name,
                model=self.model,
                config=self.model.config,
            )
        (value,) = values.values()
        return value[0] if isinstance(value, list) else value

    def _shape(self, target: _Target) -> tuple[int, ...] | None:
        if target.converter is not None:
            return None
        keys = [key for own in target.keys.values() for key in own]
        if len(keys) > 1:
            several = " and ".join(keys[:2])
            raise UnknownModel(f"{self.folder}: {several} are one weight of the model")
        return tuple(slice_of(self.files[keys[0]], keys[0]).get_shape())

    def _renamed(
        self, key: str, transforms: list[Any], tensors: dict[str, torch.Tensor]
    ) -> tuple[str, WeightConverter | None, str]:
        """(name in the model, what makes it, the pattern that ``key`` is of)."""
        name, converter, pattern = key, None, key
        for transform in transforms:
            renamed, matched = transform.rename_source_key(name)
            if matched is not None:
                name = renamed
                if isinstance(transform, WeightConverter):
                    converter, pattern = transform, matched
                    break
        base = self.model.base_model_prefix
        for candidate in (name, f"{base}.{name}", name.removeprefix(f"{base}.")):
            if candidate in tensors:
                return candidate, converter, pattern
        return name, converter, pattern


def _persistent(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The buffers that checkpoints hold."""
    kept = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def _known_extra(model: PreTrainedModel, name: str) -> bool:
    """What files may hold and the model makes by itself: tied heads, frequencies of RoPE."""
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    if any(re.search(pattern, name) for pattern in ignored):
        return True
    tied = model.state_dict(keep_vars=True)
    return name in tied or "rotary_emb" in name


def _by_number(key: str) -> list[Any]:
    """Experts 2 before 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]
