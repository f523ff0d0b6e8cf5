"""Launches, and what the Triton and the Gluon kernels put together alike for them.

A :class:`Call` is a kernel with its grid, its arguments and its compiler options. ``run`` launches
it; ``ringattn kernels`` builds the same calls on tensors without memory and only compiles them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from ringattn.kernels import Scores

from ringattn.slices import Band

LOG2E = 1 / math.log(2)
# K/V (or Q/dO) of heads that run side by side should stay in the L2 cache: 50 MB on an H100.
L2_BYTES = 32 * 2**20
# Ranks may be threads. Triton's interpreter exchanges the functions of triton.language while it
# runs, and a compiled kernel is not ready for a second thread while the first one loads it.
_ONE_AT_A_TIME = Lock()


@dataclass(frozen=True)
class Call:
    """``options``: num_warps and the like. ``grid``: programs. ``counters``: what a launch wants to
    find at zero, and counts with."""

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    options: dict[str, Any]
    device: torch.device
    counters: torch.Tensor | None = None

    def run(self) -> None:
        if not self.grid:
            return
        # Triton launches on the current device, which need not be that of the tensors.
        on = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with _ONE_AT_A_TIME, on:
            if self.counters is not None:
                self.counters.zero_()
            self.kernel[(self.grid,)](**self.arguments, **self.options)


def dense(x: torch.Tensor) -> torch.Tensor:
    """The last axis dense, as the kernels read it; all else goes by strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def aligned(x: torch.Tensor) -> bool:
    """Whether the copy engine can read x: 16 byte steps, none of them 0."""
    steps = [x.stride(axis) * x.element_size() for axis in range(3) if x.shape[axis] > 1]
    return x.data_ptr() % 16 == 0 and all(s > 0 and s % 16 == 0 for s in steps)


def order(x: torch.Tensor) -> list[int]:
    """Strides for a descriptor of x. An axis of length 1 may have any stride: it gets one that the
    copy engine takes."""
    return [x.stride(axis) if x.shape[axis] > 1 else 128 for axis in range(x.ndim - 1)] + [1]


def stepped(bands: Sequence[Band]) -> bool:
    """Whether any run of the bands steps by more than one."""
    return derived(bands, "stepped", lambda: any(b.q.step > 1 or b.k.step > 1 for b in bands))


def derived(bands: Sequence[Band], key: Any, make: Callable[[], Any]) -> Any:
    """What belongs to these bands, kept with the plan that they are of."""
    kept = getattr(bands, "derived", {})
    if key not in kept:
        kept[key] = make()
    return kept[key]


def in_base_2(scores: Scores) -> dict[str, Any]:
    """``scale``, ``cap`` and ``CAPPED`` as the kernels want them: scores in base 2, or in multiples
    of the cap."""
    if scores.softcap:
        cap = scores.softcap
        return {"scale": scores.sm_scale / cap, "cap": cap * LOG2E, "CAPPED": True}
    return {"scale": scores.sm_scale * LOG2E, "cap": 1.0, "CAPPED": False}


def side_by_side(streams: Sequence[torch.Tensor], batch: int, heads: int, least: int = 1) -> int:
    """How many of ``batch * heads`` heads run side by side: those whose streams
    ``[batch, tokens, heads, head_dim]`` fit the L2 cache together, all heads of a group at once;
    ``least`` at least."""
    kv_heads = min(heads, streams[0].shape[2])
    size = sum(x.shape[1:].numel() * x.element_size() for x in streams) // kv_heads
    together = max(1, L2_BYTES // max(1, size)) * (heads // kv_heads)
    return min(max(together, least), batch * heads)  # beyond that it would only overflow
