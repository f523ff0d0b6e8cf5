"""torch's FSDP2: its keys, what may go together, and what it costs, without torch;
:mod:`ringattn.training.engines.fsdp_engine` drives it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import model_validator

from ringattn.cost.model import EngineTraffic, Sizes, States
from ringattn.typed import Flag, OneOf, settings

if TYPE_CHECKING:
    from ringattn.training.engines import Engine, Parts


@settings
class FSDP:
    """torch's FSDP2: AdamW on float32 shards, bf16 copies gathered for computing."""

    name: Literal["fsdp"] = "fsdp"
    """deepspeed or fsdp."""
    zero_stage: Annotated[Any, OneOf(2, 3)] = 3
    """3: weights are gathered anew for the backward; 2: they stay gathered."""
    shard: Literal["world", "context"] = "world"
    """Over all ranks (world), or within the ranks of a sequence (context)."""
    offload_optimizer: Flag = False
    """Comes with offload_params."""
    offload_params: Flag = False
    """Weights and optimizer in host memory."""

    @model_validator(mode="after")
    def _offloads_both(self) -> FSDP:
        if self.offload_optimizer and not self.offload_params:
            raise ValueError(
                "engine.offload_optimizer=true: engine=fsdp offloads weights and optimizer "
                "together; give engine.offload_params=true"
            )
        return self

    @classmethod
    def choices(cls) -> Iterator[FSDP]:
        """The settings that a search tries, the cheapest in time first."""
        for shard in ("world", "context"):
            for away in (False, True):
                yield cls(shard=shard, offload_params=away)

    def check(self) -> None:
        """torch is there."""

    def build(self, parts: Parts) -> Engine:
        from ringattn.training.engines.fsdp_engine import FSDPEngine

        return FSDPEngine(self, parts)

    def start(self, backend: str, timeout_s: float) -> None:
        """torch.distributed is all that it needs."""

    @property
    def notice(self) -> str:
        return ""

    # --- what it costs: see ringattn.cost.model.EngineCost ---

    @property
    def gathers(self) -> bool:
        return True

    @property
    def on_host(self) -> bool:
        return self.offload_params

    def bucket(self, model: Sizes) -> int:
        return 0

    def states(self, model: Sizes, wide: int, world: int, cp: int) -> States:
        shards = self._shards(world, cp)  # float32
        own, trained = model.parameters / shards, model.trained / shards
        device = {"weights": 4 * own, "gradients": 4 * trained, "optimizer": 8 * trained}
        host = sum(device.values()) if self.offload_params else 0.0
        device = dict.fromkeys(device, 0.0) if self.offload_params else device
        device["weights"] += wide * model.parameters if self.zero_stage == 2 else 0.0  # gathered
        return States(device, host)

    def traffic(self, model: Sizes, wide: int, world: int, cp: int) -> EngineTraffic:
        n, shards = model.trained, self._shards(world, cp)
        share, copies = (shards - 1) / shards, world // shards
        across = 2 * 4 * n / shards * (copies - 1) / copies
        times = 1 if self.zero_stage == 2 else 2
        # Of a parameter of this rank: see deepspeed.
        gathered = times * model.parameters * wide * share
        return EngineTraffic(gathered, 4 * n * share + across, 0, 40.0 * n / shards)

    def _shards(self, world: int, cp: int) -> int:
        return cp if self.shard == "context" else world
