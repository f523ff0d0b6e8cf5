"""DeepSpeed's ZeRO 0 to 3: its keys, what may go together, and what it costs. No import of
DeepSpeed here; :mod:`ringattn.training.engines.deepspeed_engine` drives it.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import model_validator

from ringattn.cost.model import EngineTraffic, Sizes, States
from ringattn.refusal import advice
from ringattn.typed import Flag, OneOf, SettingsError, settings

if TYPE_CHECKING:
    from ringattn.training.engines import Engine, Parts

BUCKET = 500_000_000  # elements: at most so many gradients are reduced at a time


@settings
class DeepSpeed:
    """AdamW with DeepSpeed's ZeRO 0 to 3, over all ranks."""

    name: Literal["deepspeed"] = "deepspeed"
    """deepspeed or fsdp."""
    zero_stage: Annotated[Any, OneOf(0, 1, 2, 3)] = 1
    """Split over ranks: 1: the optimizer's state, 2: gradients too, 3: weights too. fsdp has 2
    (weights stay gathered between forward and backward) and 3."""
    shard: Literal["world"] = "world"
    """Over all ranks (world); fsdp also within the ranks of a sequence (context)."""
    offload_optimizer: Flag = False
    """Optimizer and its step in host memory (ZeRO 1 to 3)."""
    offload_params: Flag = False
    """Weights too (ZeRO 3)."""

    @model_validator(mode="after")
    def _offloads_what_is_split(self) -> DeepSpeed:
        if self.offload_params and self.zero_stage < 3:
            raise ValueError("engine.offload_params=true needs engine.zero_stage=3")
        if self.offload_optimizer and self.zero_stage < 1:
            raise ValueError("engine.offload_optimizer=true needs engine.zero_stage of at least 1")
        return self

    @classmethod
    def choices(cls) -> Iterator[DeepSpeed]:
        """The settings that a search tries, the cheapest in time first."""
        for stage in (1, 2, 3):
            yield cls(zero_stage=stage)
            yield cls(zero_stage=stage, offload_optimizer=True, offload_params=stage == 3)

    def check(self) -> None:
        """Raises SettingsError where DeepSpeed is not installed."""
        if find_spec("deepspeed") is None:
            raise SettingsError(f"engine=deepspeed {advice('deepspeed')}, or give engine=fsdp")

    def build(self, parts: Parts) -> Engine:
        from ringattn.training.engines.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(self, parts)

    def start(self, backend: str, timeout_s: float) -> None:
        from ringattn.training.engines.deepspeed_start import start

        start(backend, timeout_s)

    @property
    def notice(self) -> str:
        return (
            "starting DeepSpeed (its first start on a machine compiles a small extension, about "
            "half a minute)"
        )

    # --- what it costs: see ringattn.cost.model.EngineCost ---

    @property
    def gathers(self) -> bool:
        return self.zero_stage == 3

    @property
    def on_host(self) -> bool:
        return self.offload_optimizer or self.offload_params

    def bucket(self, model: Sizes) -> int:
        return min(BUCKET, model.trained) if self.zero_stage else 0

    def states(self, model: Sizes, wide: int, world: int, cp: int) -> States:
        trained, stage = model.trained, self.zero_stage
        device = {
            "weights": model.parameters * wide / (world if stage >= 3 else 1),
            "gradients": trained * wide / (world if stage >= 2 else 1),
            # AdamW's two moments in float32, and float32 weights beside bf16 ones.
            "optimizer": trained * (8 + (4 if wide == 2 else 0)) / (world if stage >= 1 else 1),
        }
        away = []
        if self.on_host:
            away += ["optimizer"] + (["gradients"] if stage >= 2 else [])
        if self.offload_params:
            away.append("weights")
        host = sum(device[name] for name in away)
        return States(device | dict.fromkeys(away, 0.0), host)

    def traffic(self, model: Sizes, wide: int, world: int, cp: int) -> EngineTraffic:
        n, share = model.trained, (world - 1) / world
        # Of a parameter of this rank: weight, gradient and two moments read, three of them
        # written, the gradient read and written once more to be clipped.
        optimizer = 40.0 * n / (world if self.zero_stage >= 1 else 1)
        if self.zero_stage == 3:
            return EngineTraffic(2 * model.parameters * wide * share, 4 * n * share, 0, optimizer)
        if self.zero_stage == 2:  # gradients go to their owners in every micro-step
            return EngineTraffic(0, 4 * n * share, n * wide * share, optimizer)
        weights = 4 * n if self.zero_stage == 0 else wide * n
        return EngineTraffic(0, 0, (4 * n + weights) * share, optimizer)
