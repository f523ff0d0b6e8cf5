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
_PACKAGES = ("ringattn", "torch", "triton", "deepspeed", "numpy", "transformers", "peft")


def write_facts(ahead: Forecast, kernel: str, run_dir: Path) -> dict[str, Any]:
    """Writes, and returns, split, plan, forecast, hardware and versions."""
    plans, step = ahead.plans, ahead.step
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    facts = {
        "format": FORMAT,
        "setup": asdict(ahead.setup),
        "parameters": ahead.run.sizes.parameters,
        "trained": ahead.run.sizes.trained,
        "plan": {
            "schedule": plans.schedule,
            "ulysses": plans.degree,
            "layout": plans.layout.name,
            "node_size": plans.first.node_size if plans else ahead.run.parallel.node_size,
            "area": plans.area,
            "imbalance": plans.imbalance,
            "steps": len(plans.heaviest.steps(0)) if plans else 0,
            "reason": plans.reason,
            "kinds": {
                kind: {
                    "layers": plans.counts[kind],
                    "mask": ahead.run.attention.texts.get(kind, "of a set of keys"),
                    "schedule": plan.schedule,
                    "ulysses": plan.ulysses,
                    "area": plan.mask.area,
                    "imbalance": plan.imbalance,
                    "steps": len(plan.steps(0)),
                }
                for kind, plan in plans.items()
            },
            "sets": {kind: asdict(ahead.run.sizes.sets_of(kind)) for kind in plans.sets},
            "states": {
                kind: {
                    "layers": plans.states[kind],
                    **asdict(ahead.run.sizes.mixer_of(kind)),
                    "segments": len(segments.all),
                    "way": ahead.way(kind),
                    "received_bytes": asdict(ahead.received_states(kind)),
                }
                for kind, segments in plans.segments.items()
            },
        },
        "device": ahead.device,
        "kernel": kernel,
        "predicted": step.as_dict() if step else None,
        "hardware": {"name": step.hardware.name, "source": step.hardware.source} if step else None,
        "versions": versions,
    }
    (run_dir / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
    return facts
