"""What is public: the names that the documentation promises, and where they are defined."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

# Modules whose public names (``__all__``, or what they define) users call.
MODULES = (
    "ringattn", "ringattn.planning.masks", "ringattn.planning.layouts", "ringattn.mixers",
    "ringattn.mixers.features", "ringattn.mixers.naive", "ringattn.mixers.naive_attention",
    "ringattn.kernels", "ringattn.context", "ringattn.batches", "ringattn.comm", "ringattn.verify",
    "ringattn.hf",
)  # fmt: skip


def names(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """(name, object) of the classes and functions that a module offers."""
    listed = getattr(module, "__all__", None)
    for name in listed or [name for name in vars(module) if not name.startswith("_")]:
        value = getattr(module, name)
        if not inspect.isclass(value) and not inspect.isfunction(value):
            continue
        if listed or value.__module__ == module.__name__:
            yield name, value


def interface() -> dict[str, Any]:
    """{dotted name: object} of all public classes and functions, each once."""
    found: dict[str, Any] = {}
    for path in MODULES:
        for name, value in names(import_module(path)):
            if value not in found.values():
                found[f"{path}.{name}"] = value
    return found
