"""ringattn: exact attention and training on sequences split over ranks."""

from importlib import import_module
from typing import Any

from ringattn.make import make_plan, make_plans
from ringattn.planning import layouts, masks
from ringattn.planning.layer_plans import LayerPlans
from ringattn.planning.plan import Plan

__all__ = [
    "LayerPlans", "Plan", "hf", "kernels", "layouts", "make_plan", "make_plans", "masks",
    "ring_attention",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # torch is imported on first use, so that planning stays light.
    if name == "ring_attention":
        return import_module("ringattn.execution.attention").ring_attention
    if name in ("hf", "kernels"):
        return import_module(f"ringattn.{name}")
    raise AttributeError(f"module 'ringattn' has no attribute {name!r}")
