"""DeepSpeed as plain data parallelism over the whole world, ZeRO 0 to 3.

DeepSpeed is not told about the sequence split: with its own sequence-parallel settings, gradients
are off by a factor that depends on the ZeRO stage. The loss carries the scaling (see
:meth:`ringattn.context.Context.scaled_loss`), which then means the same at every stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn

from ringattn.context import Attends
from ringattn.execution.carriers import Stopwatch
from ringattn.models.decoder import Loss
from ringattn.training.engines import Fragment, Parts
from ringattn.training.engines.adamw import allocate, make_optimizer, set_steps, trained
from ringattn.training.engines.deepspeed import BUCKET, DeepSpeed


class DeepSpeedEngine:
    """An :class:`ringattn.training.engines.Engine`."""

    def __init__(self, keys: DeepSpeed, parts: Parts) -> None:
        context, stage = parts.context, keys.zero_stage
        self.context, self.clip = context, parts.optimizer.clip
        self.watch = Stopwatch(context.device)
        settings = _settings(keys, parts)
        if stage == 3:  # no rank ever holds the whole model
            with deepspeed.zero.Init(config_dict_or_path=settings):
                model = parts.make_model()
            model.tie()
        else:
            with context.device:
                model = parts.make_model()
        optimizer = make_optimizer(model, parts.optimizer)
        # DeepSpeed casts buffers too, at stage 3 as they are made: frequencies of RoPE must be what
        # they are without it.
        with torch.device("meta"):
            buffers = dict(parts.make_model().named_buffers())
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        self.root = self.engine
        for name, buffer in buffers.items():
            owner, _, own = name.rpartition(".")
            model.get_submodule(owner)._buffers[own] = buffer.to(context.device)
        # DeepSpeed reduces gradients at the end of its backward: told apart to be timed.
        self.reduce = self.engine.allreduce_gradients
        self.engine.allreduce_gradients = self._reduce
        wrapper = self.engine.optimizer
        self.masters: dict[nn.Parameter, torch.Tensor] = {}  # ZeRO 0: whole, on every rank
        if wrapper is optimizer:
            self.masters = {p: p.data for p in trained(model)}
        elif isinstance(wrapper, FP16_UnfusedOptimizer):
            self.masters = dict(
                zip(chain(*wrapper.fp16_groups), chain(*wrapper.fp32_groups), strict=True)
            )
        if stage == 3:
            allocate(optimizer, wrapper.fp32_partitioned_groups_flat)
        else:
            allocate(optimizer, chain(*(group["params"] for group in optimizer.param_groups)))
            if not self.masters:
                wrapper._lazy_init_hp_params_optimizer_state()

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attend: Attends,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor | Loss:
        return self.engine(tokens, positions, attend, labels)

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss)

    def _reduce(self, *arguments: Any, **options: Any) -> None:
        with self.watch.section("engine"):
            self.reduce(*arguments, **options)

    def step(self) -> float | None:
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()
            return None
        if self._plain:
            # Without an optimizer wrapper (ZeRO 0 in fp32) DeepSpeed neither keeps the norm nor
            # looks whether it is finite; without gradients, the optimizer does nothing.
            parameters = [p for p in self.engine.module.parameters() if p.grad is not None]
            norm = nn.utils.get_total_norm([p.grad for p in parameters])
            if not math.isfinite(norm):
                self.engine.module.zero_grad(set_to_none=True)
            elif self.clip:
                nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
            self.engine.step()
            return float(norm)
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        # A step that DeepSpeed has not taken leaves inf, -1 or nothing.
        return math.nan if norm is None or float(norm) < 0 else float(norm)

    @property
    def _plain(self) -> bool:
        return self.engine.optimizer is self.engine.basic_optimizer

    def set_lr(self, lr: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr

    def train(self, mode: bool) -> None:
        self.engine.train(mode)

    def fragments(self) -> Iterator[Fragment]:
        for name, p in self.engine.module.named_parameters():
            if hasattr(p, "ds_id"):
                yield _partition(name, p)
            elif not p.requires_grad:
                yield self._frozen(name, p)
            elif p in self.masters:
                yield self._whole(name, p)
            elif p._hp_mapping is not None:
                yield _slice(name, p)

    def fragments_written(self, adam_steps: int) -> None:
        set_steps(self.engine.basic_optimizer, adam_steps)
        optimizer = self.engine.optimizer
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3
            optimizer._partition_all_parameters()
            for group in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if kept := optimizer.persistent_parameters:
                kept[0].all_gather(kept)
        elif not self.masters:
            optimizer.update_lp_params()
        else:
            for p, master in self.masters.items():
                p.data.copy_(master.data)

    def _whole(self, name: str, p: nn.Parameter) -> Fragment:
        master = self.masters[p]
        state = self.engine.basic_optimizer.state[p if self._plain else master]

        def tensor(kind: str) -> torch.Tensor:
            return (master.data if kind == "weight" else state[kind]).view(-1)

        def write(kind: str, value: torch.Tensor) -> None:
            tensor(kind).copy_(value)

        copy, copies = torch.distributed.get_rank(), self.context.world
        return Fragment(name, tuple(p.shape), 0, p.numel(), tensor, write, copy, copies)

    def _frozen(self, name: str, p: nn.Parameter) -> Fragment:
        """Below ZeRO 3: whole, on every rank, in the dtype that is computed with."""

        def read(kind: str) -> torch.Tensor:
            return p.data.float().view(-1)

        def write(kind: str, value: torch.Tensor) -> None:
            p.data.view(-1).copy_(value)

        copy, copies = torch.distributed.get_rank(), self.context.world
        return Fragment(
            name, tuple(p.shape), 0, p.numel(), read, write, copy, copies, trained=False
        )

    def close(self) -> None:
        self.engine.destroy()


def _settings(keys: DeepSpeed, parts: Parts) -> dict[str, Any]:
    context = parts.context
    place = {"device": "cpu", "pin_memory": context.device.type == "cuda"}
    # DeepSpeed allocates a bucket, by default of so many elements, however small the model.
    bucket = min(BUCKET, parts.trained)
    zero: dict[str, Any] = {"stage": keys.zero_stage, "reduce_bucket_size": bucket}
    if keys.offload_optimizer:
        zero["offload_optimizer"] = place
    if keys.offload_params:
        zero["offload_param"] = place
    plain = keys.zero_stage == 0 and parts.precision == "fp32"
    return {
        "train_micro_batch_size_per_gpu": parts.batch_size,
        "gradient_accumulation_steps": parts.grad_accum,
        "train_batch_size": parts.batch_size * parts.grad_accum * context.world,
        # Where there is no optimizer wrapper, step() clips itself.
        "gradient_clipping": 0.0 if plain else parts.optimizer.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": parts.precision == "bf16"},
        # Sums over many ranks would lose bits in bf16.
        "communication_data_type": "fp32",
        "steps_per_print": 2**62,
    }


def _partition(name: str, p: nn.Parameter) -> Fragment:
    """ZeRO 3: equal runs of every parameter, the last ones padded. Frozen ones are only in the
    dtype that is computed with."""
    size, rank = p.ds_tensor.numel(), torch.distributed.get_rank()
    start = min(rank * size, p.ds_numel)
    count = min(size, p.ds_numel - start)

    def read(kind: str) -> torch.Tensor:
        if not p.requires_grad:
            return p.ds_tensor.data[:count].float()
        if kind == "weight":
            return safe_get_local_fp32_param(p)[:count]
        return safe_get_local_optimizer_state(p, kind)[:count]

    def write(kind: str, value: torch.Tensor) -> None:
        value = nn.functional.pad(value, (0, size - count))
        if not p.requires_grad:
            p.ds_tensor.data.copy_(value)
        elif kind == "weight":
            safe_set_local_fp32_param(p, value)
        else:
            safe_set_local_optimizer_state(p, value, kind)

    return Fragment(name, tuple(p.ds_shape), start, count, read, write, trained=p.requires_grad)


def _slice(name: str, p: nn.Parameter) -> Fragment:
    """ZeRO 1 and 2, and 0 in bf16: what one rank's part of all parameters holds of this one."""
    mapping = p._hp_mapping
    where = mapping.lp_fragment_address

    def tensor(kind: str) -> torch.Tensor:
        return mapping.get_hp_fragment(None if kind == "weight" else kind)

    def write(kind: str, value: torch.Tensor) -> None:
        tensor(kind).data.copy_(value)

    return Fragment(name, tuple(p.shape), where.start, where.numel, tensor, write)
