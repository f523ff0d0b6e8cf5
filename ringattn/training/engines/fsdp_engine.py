"""torch's FSDP2 over the whole world, or within each group of ranks that share a sequence
(``engine.shard=context``: copies over the data axis). Weights, gradients and optimizer state are
float32 shards; bf16 computes with gathered bf16 copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ringattn.context import Attends
from ringattn.execution.carriers import Stopwatch
from ringattn.models.decoder import Loss
from ringattn.training.engines import Fragment, Parts
from ringattn.training.engines.adamw import allocate, make_optimizer, set_steps, trained
from ringattn.training.engines.fsdp import FSDP


class FSDPEngine:
    """An :class:`ringattn.training.engines.Engine`."""

    def __init__(self, keys: FSDP, parts: Parts) -> None:
        context = parts.context
        self.context, self.micro_steps = context, 0
        self.clip, self.grad_accum = parts.optimizer.clip, parts.grad_accum
        self.watch = Stopwatch(context.device)
        kind = context.device.type
        if keys.shard == "context":
            self.mesh = context.mesh
        else:
            self.mesh = init_device_mesh(kind, (context.world,), mesh_dim_names=("world",))
        with torch.device("meta"):
            model = parts.make_model()
        options = {
            "mesh": self.mesh,
            # At stage 2 weights stay gathered between forward and backward.
            "reshard_after_forward": keys.zero_stage == 3,
        }
        if parts.precision == "bf16":
            # RoPE's phases stay float32: inputs are not cast.
            options["mp_policy"] = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        if keys.offload_params:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=kind == "cuda")
        for part in (*model.blocks, *model.ends):
            fully_shard(part, **options)
        fully_shard(model, **options)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        model.to_empty(device="cpu" if keys.offload_params else context.device)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        model.tie()
        self.model = self.root = model
        self.optimizer = make_optimizer(model, parts.optimizer)
        allocate(self.optimizer, trained(model))

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attend: Attends,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor | Loss:
        return self.model(tokens, positions, attend, labels)

    def backward(self, loss: torch.Tensor) -> None:
        # FSDP averages over the world, and sums over micro-steps.
        (loss / self.grad_accum).backward()

    def step(self) -> float | None:
        self.micro_steps += 1
        if self.micro_steps % self.grad_accum:
            return None
        # Of the local parts, reduced on the device: offloaded gradients lie where NCCL is not.
        grads = [p.grad.to_local() for p in trained(self.model)]
        square = nn.utils.get_total_norm(grads).to(self.context.device).double() ** 2
        dist.all_reduce(square, group=self.mesh.get_group(self.mesh.ndim - 1))
        norm, clip = math.sqrt(float(square)), self.clip
        if math.isfinite(norm):
            if clip:
                torch._foreach_mul_(grads, min(1.0, clip / (norm + 1e-6)))
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def train(self, mode: bool) -> None:
        self.model.train(mode)

    def fragments(self) -> Iterator[Fragment]:
        # A forward without backward, as of an evaluation, leaves some weights gathered.
        parts = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        for part in parts:
            part.reshard()
        # A forward that was broken off keeps what it would reshard after the backward only.
        if not all(isinstance(p, DTensor) for p in self.model.parameters()):
            for part in parts:
                part.set_reshard_after_forward(True, recurse=False)
                part.reshard()
        shards = self.mesh.size(-1)
        place = self.mesh.get_local_rank(self.mesh.ndim - 1)
        copies = self.mesh.size(0) if self.mesh.ndim == 2 else 1
        copy = self.mesh.get_local_rank(0) if self.mesh.ndim == 2 else 0
        for name, p in self.model.named_parameters():
            # Whole rows, cut as torch.chunk does.
            rows = -(-p.shape[0] // shards)
            start = min(place * rows, p.shape[0]) * (p.numel() // p.shape[0])
            tensor = _local(p, self.optimizer.state[p] if p.requires_grad else {})
            count = tensor("weight").numel()
            yield Fragment(
                name, tuple(p.shape), start, count, tensor, _writer(tensor), copy, copies,
                p.requires_grad,
            )  # fmt: skip

    def fragments_written(self, adam_steps: int) -> None:
        set_steps(self.optimizer, adam_steps)

    def close(self) -> None:
        pass


def _local(p: nn.Parameter, state: dict[str, torch.Tensor]) -> Callable[[str], torch.Tensor]:
    def tensor(kind: str) -> torch.Tensor:
        whole = p.data if kind == "weight" else state[kind]
        return whole.to_local().view(-1)

    return tensor


def _writer(tensor: Callable[[str], torch.Tensor]) -> Callable[[str, torch.Tensor], None]:
    def write(kind: str, value: torch.Tensor) -> None:
        tensor(kind).copy_(value)

    return write
