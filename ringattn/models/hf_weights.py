"""Weights of Hugging Face checkpoints in a local folder: sharded safetensors, read run by run, so
that no process holds more than its own part, and written shard by shard.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ringattn.models.hf_config import UnknownModel

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def hf_name(name: str) -> str:
    """Our name of a weight as such checkpoints have it."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def index(folder: Path) -> dict[str, Path]:
    """The file of every weight. Raises UnknownModel where there are no safetensors."""
    try:
        if (folder / INDEX).is_file():
            weights = json.loads((folder / INDEX).read_text())["weight_map"]
            return {name: folder / Path(file).name for name, file in weights.items()}
        if (folder / SINGLE).is_file():
            with safe_open(folder / SINGLE, "pt") as file:
                return dict.fromkeys(file.keys(), folder / SINGLE)
    except (ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise UnknownModel(f"{folder}: cannot be read: {error}") from None
    other = [p.name for kind in ("*.bin", "*.pt", "*.pth") for p in folder.glob(kind)]
    raise UnknownModel(
        f"{folder}: no {SINGLE} and no {INDEX}"
        + (f" (pickled weights as {other[0]} are not read)" if other else "")
    )


def slice_of(path: Path, key: str) -> Any:
    """A weight in a file, of which rows can be read. Raises UnknownModel."""
    try:
        return safe_open(path, "pt").__enter__().get_slice(key)
    except (OSError, SafetensorError) as error:
        raise UnknownModel(f"{path}: {error}") from None


def refuse_others(folder: Path, missing: Collection[str], extra: Collection[str]) -> None:
    """Raises UnknownModel for weights that a folder lacks, or has beside those of a model."""
    for names, what in ((missing, "lacks"), (extra, "has more:")):
        if names:
            raise UnknownModel(f"{folder} {what} {len(names)} weights, as {min(names)}")


def run_of(
    shape: tuple[int, ...], start: int, count: int, rows: Callable[[int, int], torch.Tensor]
) -> torch.Tensor:
    """Elements ``start`` to ``start + count`` of a flat weight, float32, of which ``rows(first,
    last)`` reads whole rows."""
    if not count:
        return torch.empty(0)
    width = torch.Size(shape[1:]).numel()
    first, last = start // width, -(-(start + count) // width)
    return rows(first, last).float().flatten()[start - first * width :][:count]


class Pretrained:
    """The weights of a folder as a :class:`ringattn.training.states.Source`.

    Raises UnknownModel if the folder has no safetensors, or not just the weights of ``shapes``
    (name to shape, ours): what would be missing or ignored is named.
    """

    def __init__(self, folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
        self.folder = folder
        self.files = index(folder)
        wanted = {hf_name(name) for name in shapes}
        # Tied heads are often saved too, and old checkpoints have RoPE's frequencies.
        extra = {
            name
            for name in self.files
            if name not in wanted and name != "lm_head.weight" and "rotary_emb" not in name
        }
        refuse_others(folder, wanted - set(self.files), extra)
        for name, shape in shapes.items():
            stored = tuple(self._slice(name).get_shape())
            if stored != tuple(shape):
                raise UnknownModel(f"{folder}: {hf_name(name)} is {stored}, not {tuple(shape)}")

    def _slice(self, name: str):
        return slice_of(self.files[hf_name(name)], hf_name(name))

    def read(
        self, kind: str, name: str, shape: tuple[int, ...], start: int, count: int
    ) -> torch.Tensor:
        if kind != "weight":
            return torch.zeros(count)
        stored = self._slice(name)
        return run_of(shape, start, count, lambda first, last: stored[first:last])


def save(folder: Path, weights: Iterable[tuple[str, torch.Tensor]], shard_bytes: int) -> int:
    """Writes (our name, tensor) pairs as safetensors of up to ``shard_bytes`` (or one tensor), with
    an index; holds one shard at a time. Returns the bytes of all tensors."""
    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    total = size = 0

    def flush() -> None:
        nonlocal size
        save_file(shard, folder / f"part_{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()
        size = 0

    for name, tensor in weights:
        if shard and size + tensor.nbytes > shard_bytes:
            flush()
        shard[hf_name(name)] = tensor.contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    if shard:
        flush()
    places = {}
    for i, names in enumerate(shards):
        file = SINGLE if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"part_{i}").rename(folder / file)
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return total
