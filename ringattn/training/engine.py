"""DeepSpeed as plain data parallelism over the whole world.

DeepSpeed is not told about the sequence split: with its own sequence-parallel settings, gradients
are off by a factor that depends on the ZeRO stage. The loss carries the scaling (see
:meth:`ringattn.context.Context.scaled_loss`), which then means the same at every stage.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import math
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import nn

from ringattn.context import Attend, Context
from ringattn.training.settings import ConfigError


def start_distributed(device: torch.device, timeout_s: float) -> None:
    """Initialises torch.distributed and DeepSpeed's communication, once per process."""
    if dist.is_initialized():
        return
    # On a GPU the communicator is made eagerly: lazy ones hang in asymmetric exchanges.
    eager = {"device_id": device} if device.type == "cuda" else {}
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), **eager)
    quiet = logging.getLogger("DeepSpeed")
    quiet.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
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


class DeepSpeedEngine:
    """A model with its optimizer. The loop calls forward, backward, step, save and load."""

    def __init__(self, model: nn.Module, config: DictConfig, context: Context) -> None:
        import deepspeed

        decayed = [p for p in model.parameters() if p.ndim >= 2]
        others = [p for p in model.parameters() if p.ndim < 2]
        self._groups = [
            {"weight_decay": decay, "betas": tuple(config.optim.betas)}
            for decay in (config.optim.weight_decay, 0.0)
        ]
        # The learning rate is set before every step. Until then it is 0: with bf16 at ZeRO 0
        # DeepSpeed makes a step of its own, on gradients of 0, to allocate the optimizer's state.
        optimizer = torch.optim.AdamW(
            [
                {"params": params, **group}
                for params, group in zip((decayed, others), self._groups, strict=True)
            ],
            lr=0.0,
        )
        settings = {
            "train_micro_batch_size_per_gpu": config.batch_size,
            "gradient_accumulation_steps": config.train.grad_accum,
            "train_batch_size": config.batch_size * config.train.grad_accum * context.world,
            "gradient_clipping": config.optim.clip,
            "zero_optimization": {"stage": config.engine.zero_stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": config.precision == "bf16"},
            # Sums over many ranks would lose bits in bf16.
            "communication_data_type": "fp32",
            "steps_per_print": 2**62,
        }
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        for state in self.engine.basic_optimizer.state.values():
            state["step"].zero_()  # that step must not count in Adam's bias correction

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        return self.engine(tokens, positions, attend)

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss)

    def step(self) -> float | None:
        """Steps after the last micro-step of an accumulation; then the gradient norm, else None."""
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()
            return None
        # Without an optimizer wrapper (ZeRO 0 in fp32) DeepSpeed does not keep the norm.
        grads = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        own = nn.utils.get_total_norm(grads) if self._plain else None
        self.engine.step()
        norm = own if self._plain else self.engine.get_global_grad_norm()
        return math.nan if norm is None else float(norm)

    @property
    def _plain(self) -> bool:
        return isinstance(self.engine.optimizer, torch.optim.Optimizer) and not hasattr(
            self.engine.optimizer, "optimizer"
        )

    def set_lr(self, lr: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr

    def train(self, mode: bool) -> None:
        self.engine.train(mode)

    def save(self, path: Path) -> None:
        """Collective: every rank writes its part below ``path``."""
        self.engine.save_checkpoint(str(path.parent), tag=path.name, save_latest=False)

    def load(self, path: Path) -> None:
        loaded, _ = self.engine.load_checkpoint(str(path.parent), tag=path.name)
        if loaded is None:
            raise RuntimeError(f"DeepSpeed could not load the checkpoint {path}")
        # A checkpoint brings its own weight decay and betas; this run's hold.
        for group, ours in zip(self.engine.optimizer.param_groups, self._groups, strict=True):
            group.update(ours)

    def close(self) -> None:
        self.engine.destroy()


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
