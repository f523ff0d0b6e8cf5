"""ringattn: exact attention and training on sequences split over ranks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ringattn.make import make_blocks, make_plan, make_plans, make_segments
from ringattn.planning import layouts, masks
from ringattn.planning.blocks import Blocks
from ringattn.planning.layer_plans import LayerPlans
from ringattn.planning.plan import Plan
from ringattn.planning.segments import Segments

if TYPE_CHECKING:  # what __getattr__ imports when it is first used
    from ringattn import hf, kernels, mixers
    from ringattn.execution.attention import ring_attention

__all__ = [
    "Blocks", "LayerPlans", "Plan", "Segments", "hf", "kernels", "layouts", "make_blocks",
    "make_plan", "make_plans", "make_segments", "masks", "mixers", "ring_attention",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # torch is imported on first use, so that planning stays light.
    if name == "ring_attention":
        return import_module("ringattn.execution.attention").ring_attention
    if name in ("hf", "kernels", "mixers"):
        return import_module(f"ringattn.{name}")
    raise AttributeError(f"module 'ringattn' has no attribute {name!r}")
