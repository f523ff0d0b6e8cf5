"""What is kept of a block's forward for its backward: its input and attention's result (with heads
split over ranks, also q, k, v and out as exchanged), on the device or in host memory. All else is
computed again, attention and its exchange are not.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch.autograd.graph import save_on_cpu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

Function = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Memory:
    """``checkpoint``: compute blocks again in the backward, but attention. ``offload``: what is
    then kept waits in host memory (pinned, for a GPU). ``ffn_tile``: tokens of the feed-forward at
    a time, each computed again in the backward (None: all at once). ``loss_chunk``: tokens of the
    loss at a time (see :func:`ringattn.models.loss.chunked_cross_entropy`). ``loss``: "chunked",
    or "liger" for liger-kernel's.

    Raises ValueError for offload without checkpoint.
    """

    checkpoint: bool = False
    offload: bool = False
    ffn_tile: int | None = None
    loss_chunk: int | None = None
    loss: str = "chunked"

    def __post_init__(self) -> None:
        if self.offload and not self.checkpoint:
            raise ValueError("memory.offload=true needs memory.checkpoint=true")

    def block(self, function: Function, x: torch.Tensor) -> torch.Tensor:
        """``function(x)``, keeping of it what the settings say. x may not change afterwards."""
        if not (self.checkpoint and torch.is_grad_enabled()):
            return function(x)
        pinned = x.device.type != "cpu"
        outside = save_on_cpu(pin_memory=pinned) if self.offload else nullcontext()
        with outside:
            return checkpoint(
                function,
                x,
                use_reentrant=False,
                preserve_rng_state=False,  # nothing here draws
                context_fn=partial(_keeping_attention, self.offload),
            )

    def tiles(self, function: Function, x: torch.Tensor) -> torch.Tensor:
        """``function(x)`` for a function of each token alone, x ``[batch, tokens, dim]``."""
        if self.ffn_tile is None or x.shape[1] <= self.ffn_tile:
            return function(x)
        run = function
        if torch.is_grad_enabled():
            run = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([run(tile) for tile in x.split(self.ffn_tile, 1)], 1)


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
