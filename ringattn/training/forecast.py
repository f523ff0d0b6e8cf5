"""What a run is expected to take, before it begins: its keys as the cost model reads them."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from importlib import metadata
from typing import Any

from omegaconf import DictConfig

from ringattn.cost import Hardware, buffers, sample
from ringattn.cost.model import Setup, footprint
from ringattn.cost.step import Prediction, predict
from ringattn.models.sizes import ModelConfig
from ringattn.plan import Plan
from ringattn.training.batch import build_mask, strategy
from ringattn.training.job import Job, model_of
from ringattn.training.settings import hardware_of

FACTS, FORMAT = "facts.json", 1  # of a run directory
_PACKAGES = ("ringattn", "torch", "triton", "deepspeed", "numpy", "transformers")


def setup_of(config: DictConfig, world: int, plan: Plan, device: str = "cuda") -> Setup:
    """The keys that cost depends on, with what was chosen for ``plan``."""
    engine, memory = config.engine, config.memory
    return Setup(
        world=world,
        cp=plan.world,
        ulysses=plan.ulysses,
        schedule=plan.schedule,
        layout=plan.layout.name,
        precision=config.precision,
        batch=config.batch_size,
        grad_accum=config.train.grad_accum,
        engine=engine.name,
        zero_stage=engine.zero_stage,
        shard=engine.shard,
        offload_optimizer=engine.offload_optimizer,
        offload_params=engine.offload_params,
        checkpoint=memory.checkpoint,
        offload=memory.offload,
        ffn_tile=memory.ffn_tile,
        loss_chunk=memory.loss_chunk,
        device=device,
    )


def forecast(
    config: DictConfig,
    model: ModelConfig,
    plan: Plan,
    world: int,
    hardware: Hardware | None,
    device: str = "cuda",
) -> Prediction | None:
    """The step that ``plan`` is for; None where the hardware is not known."""
    if hardware is None:
        return None
    ranks = list(range(plan.world)) if plan.world <= 8 else None
    return predict(model, setup_of(config, world, plan, device), plan, hardware, ranks)


def paper_plan(config: DictConfig, world: int) -> tuple[ModelConfig, Plan]:
    """The model, and the plan of a batch of whole sequences, from the keys alone: no data is
    opened, so documents are not known. Raises ValueError."""
    model = model_of(config)
    mask = build_mask(config, [config.seq_len] * config.batch_size)
    return model, strategy(config, model, hardware_of(config)).plan(mask)


def memory_need(config: DictConfig, world: int) -> float:
    """Bytes that a rank needs on its device, framework aside. Raises ValueError."""
    model, plan = paper_plan(config, world)
    tokens = max(plan.layout.count(rank) for rank in plan.layout.ranks)
    rows = [buffers(plan.rank(rank)) for rank in sample(plan)]
    most = max(r.kv for r in rows), max(r.grads for r in rows)
    return footprint(model, setup_of(config, world, plan), tokens, *most).device


def write_facts(job: Job, plan: Plan, world: int, where: tuple[str, str]) -> dict[str, Any]:
    """Writes, and returns, what is known before the first step: split, plan, prediction, hardware
    and versions. ``where``: names of device and kernel."""
    config, model = job.config, job.model
    ahead = forecast(config, model, plan, world, job.hardware, where[0])
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    facts = {
        "format": FORMAT,
        "setup": asdict(setup_of(config, world, plan, where[0])),
        "parameters": model.parameters,
        "plan": {
            "schedule": plan.schedule,
            "ulysses": plan.ulysses,
            "layout": plan.layout.name,
            "node_size": plan.node_size,
            "area": plan.mask.area,
            "imbalance": plan.imbalance,
            "steps": len(plan.steps(0)),
            "reason": plan.reason,
        },
        "device": where[0],
        "kernel": where[1],
        "predicted": ahead.as_dict() if ahead else None,
        "hardware": {"name": ahead.hardware.name, "source": ahead.hardware.source}
        if ahead
        else None,
        "versions": versions,
    }
    (job.run_dir / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
    return facts
