"""What is kept of a block's forward for its backward: its input and attention's result (with heads
split over ranks, also q, k, v and out as exchanged), on the device or in host memory. All else is
computed again, attention and its exchange are not.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from ringattn.models.memory import Memory

Function = Callable[[torch.Tensor], torch.Tensor]


def block(memory: Memory, function: Function, x: torch.Tensor) -> torch.Tensor:
    """``function(x)`` of a block, keeping of it what the settings say. x may not change
    afterwards."""
    if not (memory.checkpoint and torch.is_grad_enabled()):
        return function(x)
    return keeping(memory, function, x, draws=False)


def keeping(
    memory: Memory, function: Callable[..., Any], x: torch.Tensor, *more: Any, draws: bool
) -> Any:
    """``function(x, *more)``, to be computed again in the backward without attention; ``draws``:
    whether it uses random numbers, which then are the same."""
    outside = save_on_cpu(pin_memory=x.device.type != "cpu") if memory.offload else nullcontext()
    with outside:
        return checkpoint(
            function,
            x,
            *more,
            use_reentrant=False,
            preserve_rng_state=draws,
            context_fn=partial(_keeping_attention, memory.offload),
        )


def tiles(memory: Memory, function: Function, x: torch.Tensor) -> torch.Tensor:
    """``function(x)`` for a function of each token alone, x ``[batch, tokens, dim]``."""
    if not memory.tiled(x.shape[1]):
        return function(x)
    run = function
    if torch.is_grad_enabled():
        run = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([run(tile) for tile in x.split(memory.ffn_tile, 1)], 1)


def _keeping_attention(offload: bool) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts of torch's checkpoint for a forward and its recomputation: the second takes
    attention's results from the first. (torch's selective checkpointing can keep them too, but
    ignores its own offload policy outside of torch.compile.)"""
    kept: list[object] = []
    return _Keep(kept, offload), _Replay(kept)


class _Keep(TorchDispatchMode):
    def __init__(self, kept: list[object], offload: bool) -> None:
        super().__init__()
        self.kept, self.offload = kept, offload

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.ringattn.attention.default:
            keep = _to_host if self.offload else torch.Tensor.detach
            self.kept.append(tree_map_only(torch.Tensor, lambda x: (x.device, keep(x)), out))
        return out


class _Replay(TorchDispatchMode):
    def __init__(self, kept: list[object]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.ringattn.attention.default:
            return _back(self.kept.pop(0))
        return func(*args, **(kwargs or {}))


def _to_host(x: torch.Tensor) -> torch.Tensor:
    if x.device.type == "cpu":
        return x.detach()
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return host.copy_(x, non_blocking=True)


def _back(kept: object) -> object:
    """Tensors on their own device, in the structure in which they were kept."""
    if isinstance(kept, tuple) and kept and isinstance(kept[0], torch.device):
        device, x = kept
        return x.to(device, non_blocking=True)
    return type(kept)(map(_back, kept))
