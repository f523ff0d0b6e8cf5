"""``ringattn predict``: memory, traffic and FLOPs of a training run, on a machine without its GPUs.

The keys are train.py's, and ``world``. Data is not opened: the mask is that of one document a
sequence, the most that a step can cost.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console

from ringattn.cli.request import RequestError, count
from ringattn.training import settings
from ringattn.training.display import plan_table
from ringattn.training.forecast import forecast, memory_need, paper_plan, setup_of
from ringattn.training.settings import hardware_of


def run(arguments: Sequence[str]) -> int:
    """The command."""
    if any(a in ("-h", "--help") for a in arguments):
        print("usage: ringattn predict world=N KEY=VALUE... [--json] (keys: train.py --help)")
        return 0
    as_json = "--json" in arguments
    arguments = [a for a in arguments if a != "--json"]
    given = [a.removeprefix("world=") for a in arguments if a.startswith("world=")]
    try:
        world = count(given[-1]) if given else 1
    except ValueError as error:
        raise RequestError(f"world must be {error}; got {given[-1]!r}") from None
    try:
        config = settings.load(
            ["data.root=null", *(a for a in arguments if not a.startswith("world="))]
        )
        settings.check(config, world)
        model, plan = paper_plan(config, world)
        hardware = hardware_of(config)
    except ValueError as error:
        raise RequestError(str(error)) from None
    if as_json:
        ahead = forecast(config, model, plan, world, hardware)
        facts = {
            "plan": str(plan),
            "setup": asdict(setup_of(config, world, plan)),
            "device_bytes": memory_need(config, world),
            "predicted": ahead.as_dict() if ahead else None,
            "hardware": hardware.source if hardware else None,
        }
        print(json.dumps(facts))
        return 0
    where = ("any device", config.kernel)
    table = plan_table(config, model, plan, world, where, config.peak_flops, hardware=hardware)
    Console(highlight=False).print(table)
    return 0
