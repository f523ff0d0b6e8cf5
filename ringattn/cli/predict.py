"""``ringattn predict``: memory, traffic and FLOPs of a training run, on a machine without its GPUs.

The keys are train.py's, and ``world``. Data is not opened: the mask is that of one document a
sequence, the most that a step can cost.
"""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import OmegaConf
from rich.console import Console

from ringattn.cli.request import RequestError, count
from ringattn.models.decoder import ModelConfig
from ringattn.models.rope_config import RopeConfig
from ringattn.training import settings
from ringattn.training.batch import build_mask, strategy
from ringattn.training.display import plan_table


def run(arguments: Sequence[str]) -> int:
    """The command."""
    if any(a in ("-h", "--help") for a in arguments):
        print("usage: ringattn predict world=N KEY=VALUE... (keys of train.py; train.py --help)")
        return 0
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
        sizes = OmegaConf.to_container(config.model)
        del sizes["path"]
        model = ModelConfig(**{**sizes, "rope": RopeConfig(**sizes["rope"])})
        mask = build_mask(config, [config.seq_len] * config.batch_size)
        plan = strategy(config, model).plan(mask)
    except ValueError as error:
        raise RequestError(str(error)) from None
    table = plan_table(config, model, plan, world, ("any device", config.kernel), config.peak_flops)
    Console(highlight=False).print(table)
    return 0
