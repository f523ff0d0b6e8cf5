"""ringattn: exact attention and training on sequences split over ranks."""

from importlib import import_module
from typing import Any

from ringattn.make import make_plan
from ringattn.planning import layouts, masks
from ringattn.planning.plan import Plan

__all__ = ["Plan", "kernels", "layouts", "make_plan", "masks", "ring_attention"]


def __getattr__(name: str) -> Any:
    # torch is imported on first use, so that planning stays light.
    if name == "ring_attention":
        return import_module("ringattn.execution.attention").ring_attention
    if name == "kernels":
        return import_module("ringattn.kernels")
    raise AttributeError(f"module 'ringattn' has no attribute {name!r}")
