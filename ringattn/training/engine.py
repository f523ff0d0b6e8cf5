"""What the loop asks of an engine, and how one is started. ``deepspeed_engine`` and
``fsdp_engine`` are the engines; the loop does not know which one it drives.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import nn

from ringattn.comm import Stopwatch
from ringattn.context import Attend, Context
from ringattn.models.decoder import Decoder, Loss, ModelConfig
from ringattn.models.memory import Memory
from ringattn.training.rendezvous import fresh_store
from ringattn.training.settings import ConfigError

KINDS = ("weight", "exp_avg", "exp_avg_sq")  # what training keeps of a parameter, in float32


@dataclass(frozen=True)
class Fragment:
    """Elements ``start`` to ``start + count`` of a parameter, flattened: what this rank keeps of
    it. However an engine splits weights and optimizer state, the parts are such runs, so that a
    checkpoint of them fits any other split.

    ``read(kind)`` is a float32 tensor ``[count]`` and ``write(kind, value)`` sets it, kind from
    KINDS. ``copy`` of ``copies`` ranks hold the same fragment.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    count: int
    read: Callable[[str], torch.Tensor]
    write: Callable[[str, torch.Tensor], None]
    copy: int = 0
    copies: int = 1


class Engine(Protocol):
    """A model with its optimizer, split over the world as its kind does it. What it does beside
    the model in ``backward`` is a section "engine" of ``watch``, where it can be told apart."""

    watch: Stopwatch

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attend: Attend,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor | Loss:
        """As :class:`ringattn.models.decoder.Decoder`."""

    def backward(self, loss: torch.Tensor) -> None:
        """Adds to gradients that are means over the world and over ``train.grad_accum``."""

    def step(self) -> float | None:
        """After the last micro-step: clips, steps, and gives the norm of the gradient before
        clipping. If that is not finite, nothing but the gradients has changed. None after other
        micro-steps."""

    def set_lr(self, lr: float) -> None: ...

    def train(self, mode: bool) -> None: ...

    def fragments(self) -> Iterator[Fragment]:
        """This rank's part of every parameter, in the same order of names on all ranks."""

    def written(self, adam_steps: int) -> None:
        """Collective. To be called after fragments were written: what is computed with follows
        them, and the optimizer has made ``adam_steps`` steps."""

    def close(self) -> None: ...


def build(config: DictConfig, model: ModelConfig, context: Context) -> Engine:
    """The configured engine, on every rank; its weights are still to be written."""
    if config.engine.name == "fsdp":
        from ringattn.training.fsdp_engine import FSDPEngine as Kind
    else:
        from ringattn.training.deepspeed_engine import DeepSpeedEngine as Kind
    memory = Memory(
        config.memory.checkpoint,
        config.memory.offload,
        config.memory.ffn_tile,
        config.memory.loss_chunk,
        config.memory.loss,
    )
    return Kind(lambda: Decoder(model, None, memory), config, context, model.parameters)


def make_optimizer(model: nn.Module, config: DictConfig) -> torch.optim.AdamW:
    """AdamW; only matrices decay (what is a matrix, a flat part of ZeRO 3 does not show).

    The learning rate is set before every step; until then it is 0, so that a step on gradients of
    0, which DeepSpeed makes to allocate, changes nothing."""
    parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for p in model.parameters():
        parts[len(getattr(p, "ds_shape", p.shape)) >= 2].append(p)
    groups = [
        {"params": params, "weight_decay": config.optim.weight_decay if decays else 0.0}
        for decays, params in parts.items()
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=tuple(config.optim.betas), fused=True)


def allocate(optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor]) -> None:
    """Gives AdamW the state that it would make at its first step, so that it can be written."""
    for p in parameters:
        state = optimizer.state[p]
        state.setdefault("step", torch.zeros((), dtype=torch.float32, device=p.device))
        for kind in KINDS[1:]:
            state.setdefault(kind, torch.zeros_like(p))


def set_steps(optimizer: torch.optim.Optimizer, adam_steps: int) -> None:
    for state in optimizer.state.values():
        state["step"].fill_(adam_steps)


def start_distributed(device: torch.device, timeout_s: float, engine: str) -> None:
    """Initialises torch.distributed and, for that engine, DeepSpeed's communication, once per
    process."""
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
    if engine != "deepspeed":
        return
    quiet = logging.getLogger("DeepSpeed")
    quiet.setLevel(logging.ERROR)
    if device.type == "cpu":
        _build_extension()
    import deepspeed

    deepspeed.init_distributed(
        dist_backend=backend, verbose=False, timeout=timedelta(seconds=timeout_s)
    )


def _build_extension() -> None:
    """Compiles DeepSpeed's shared-memory extension, one process at a time.

    torch guards a build with a lock file that outlives a killed process, and every later start
    then waits forever. Here the kernel's own lock decides: who holds it knows that a lock file
    in this folder is a leftover. The folder belongs to one environment, so two never rebuild
    each other's. A TORCH_EXTENSIONS_DIR of the user's is left alone.
    """
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    environment = hashlib.sha256(f"{sys.prefix} {torch.__version__}".encode()).hexdigest()[:12]
    folder = cache / "ringattn" / "extensions" / environment
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    # The build calls ninja, which lies beside the Python of an environment that is not activated.
    beside = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([beside, os.environ.get("PATH", os.defpath)])
    with (folder / "building").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        for leftover in folder.glob("*/lock"):
            leftover.unlink()
        from deepspeed.accelerator import get_accelerator

        builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
        if builder is not None and builder.is_compatible():
            builder.load(verbose=False)


def pick_device(name: str) -> torch.device:
    """The device of this process for ``device=auto|cpu|cuda``. Must run before DeepSpeed loads.

    ``auto`` takes GPUs if this machine has one for each of its processes. Raises ConfigError if
    ``cuda`` is asked for and it has not.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = torch.cuda.device_count()
    if name == "cuda" and gpus < processes:
        raise ConfigError(
            f"device=cuda: this machine has {gpus} usable GPUs for {processes} processes; "
            "start fewer processes or give device=cpu"
        )
    if name == "cpu" or gpus < processes:
        os.environ["DS_ACCELERATOR"] = "cpu"
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
