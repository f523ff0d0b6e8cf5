"""The facts of a run directory: what is known before the first step."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from ringattn.training.forecast import Forecast

FACTS, FORMAT = "facts.json", 1  # of a run directory
_PACKAGES = ("ringattn", "torch", "triton", "deepspeed", "numpy", "transformers")


def write_facts(ahead: Forecast, kernel: str, run_dir: Path) -> dict[str, Any]:
    """Writes, and returns, split, plan, forecast, hardware and versions."""
    plan, step = ahead.plan, ahead.step
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    facts = {
        "format": FORMAT,
        "setup": asdict(ahead.setup),
        "parameters": ahead.run.model.parameters,
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
        "device": ahead.device,
        "kernel": kernel,
        "predicted": step.as_dict() if step else None,
        "hardware": {"name": step.hardware.name, "source": step.hardware.source} if step else None,
        "versions": versions,
    }
    (run_dir / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
    return facts
