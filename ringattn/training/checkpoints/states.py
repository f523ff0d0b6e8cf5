"""Weights and optimizer state between engines and files: fragments out, fragments in.

A checkpoint is one safetensors file a rank, each tensor a run of a flattened parameter in float32,
named ``KIND:START:PARAMETER``. Frozen parameters are not in it. Any split of the model reads any
other's files, each rank only the runs that it needs; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import math
import os
from bisect import bisect_right
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ringattn.models.decoder import ModelConfig, initial_weight
from ringattn.training.engines import Engine


class Source(Protocol):
    """Where parameters come from."""

    def read(
        self, kind: str, name: str, shape: tuple[int, ...], start: int, count: int
    ) -> torch.Tensor:
        """Elements ``start`` to ``start + count`` of a flattened parameter or of its optimizer
        state, float32 on the host."""


class Fresh:
    """A model that has not been trained: see :func:`initial_weight`."""

    def __init__(self, model: ModelConfig, seed: int) -> None:
        self.model, self.seed = model, seed

    def read(
        self, kind: str, name: str, shape: tuple[int, ...], start: int, count: int
    ) -> torch.Tensor:
        if kind != "weight":
            return torch.zeros(count)
        whole = initial_weight(self.model, self.seed, name, torch.Size(shape))
        return whole.view(-1)[start : start + count]


class Saved:
    """The files of a checkpoint; use as a context manager."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __enter__(self) -> Saved:
        self._stack = ExitStack()
        self._runs: dict[tuple[str, str], list[tuple[int, Any, str]]] = defaultdict(list)
        for path in self.files:
            file = self._stack.enter_context(safe_open(path, "pt"))
            for key in file.keys():  # noqa: SIM118 - not a dict
                kind, start, name = key.split(":", 2)
                self._runs[kind, name].append((int(start), file, key))
        for runs in self._runs.values():
            runs.sort(key=lambda run: run[0])
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def names(self) -> list[str]:
        return sorted({name for kind, name in self._runs if kind == "weight"})

    def read(
        self, kind: str, name: str, shape: tuple[int, ...], start: int, count: int
    ) -> torch.Tensor:
        """Raises RuntimeError if the files do not hold all of it."""
        runs, at, parts = self._runs.get((kind, name), []), start, []
        index = max(0, bisect_right([run[0] for run in runs], start) - 1)
        for begin, file, key in runs[index:]:
            if at >= start + count or begin > at:
                break
            part = file.get_slice(key)[at - begin : start + count - begin]
            parts.append(part)
            at += len(part)
        if at < start + count:
            raise RuntimeError(f"the checkpoint lacks elements {at} and on of {name} ({kind})")
        return torch.cat(parts) if parts else torch.empty(0)


class NotFinite(RuntimeError):
    """Weights that are to be started from are not numbers; raised on all ranks."""


def fill(engine: Engine, source: Source, frozen: Source, adam_steps: int) -> None:
    """Collective: the engine's weights and optimizer state, each rank its own part; ``frozen``:
    where frozen parameters come from. Raises NotFinite."""
    bad: list[str] = []
    with torch.no_grad():
        for f in engine.fragments():
            origin = source if f.trained else frozen
            for kind in f.kinds:
                value = origin.read(kind, f.name, f.shape, f.start, f.count)
                if not math.isfinite(float(value.sum(dtype=torch.float64))):  # takes no memory
                    bad.append(f"{f.name} ({kind})")
                f.write(kind, value)
        everyone: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(everyone, bad[:3])
        if found := sorted({name for names in everyone for name in names}):
            raise NotFinite(
                f"the weights to start from are not all finite: {', '.join(found[:3])}; a model "
                "that was trained so is lost"
            )
        engine.fragments_written(adam_steps)


def snapshot(engine: Engine) -> dict[str, torch.Tensor]:
    """What this rank has to write, copied to the host; of copies each writes a share."""
    tensors = {}
    with torch.no_grad():
        for f in engine.fragments():
            first, stop = (f.count * (f.copy + i) // f.copies for i in (0, 1))
            if first == stop or not f.trained:
                continue
            for kind in f.kinds:
                part = f.read(kind)[first:stop].to("cpu", copy=True)
                tensors[f"{kind}:{f.start + first}:{f.name}"] = part
    return tensors


def write(path: Path, tensors: dict[str, torch.Tensor]) -> tuple[int, str]:
    """(bytes, SHA-256) of what then lies on the disk. Raises OSError."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(str(error)) from None
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return path.stat().st_size, digest(path)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
