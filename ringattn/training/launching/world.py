"""Which device a process takes, and how its world begins."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ringattn.training.engines import EngineSettings
from ringattn.training.launching.rendezvous import fresh_store
from ringattn.typed import SettingsError


def start_distributed(device: torch.device, timeout_s: float, engine: EngineSettings) -> None:
    """Initialises torch.distributed and what the engine needs beside it, once per process."""
    if dist.is_initialized():
        return
    # On a GPU the communicator is made eagerly: lazy ones hang in asymmetric exchanges.
    eager: dict[str, Any] = {"device_id": device} if device.type == "cuda" else {}
    backend = "nccl" if device.type == "cuda" else "gloo"
    if (store := fresh_store(timeout_s)) is not None:
        eager |= {"store": store, "rank": int(os.environ["RANK"]),
                  "world_size": int(os.environ["WORLD_SIZE"])}  # fmt: skip
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), **eager)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    engine.start(backend, timeout_s)


def pick_device(name: str) -> torch.device:
    """The device of this process for ``device=auto|cpu|cuda``. Must run before DeepSpeed loads.

    ``auto`` takes GPUs if this machine has one for each of its processes. Raises SettingsError if
    ``cuda`` is asked for and it has not.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = torch.cuda.device_count()
    if name == "cuda" and gpus < processes:
        raise SettingsError(
            f"device=cuda: this machine has {gpus} usable GPUs for {processes} processes; "
            "start fewer processes or give device=cpu"
        )
    if name == "cpu" or gpus < processes:
        os.environ["DS_ACCELERATOR"] = "cpu"
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
