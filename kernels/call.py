"""Launches, and what the Triton and the Gluon kernels put together alike for them.

A :class:`Call` is a kernel with its grid, its arguments and its compiler options. To put one
together takes the host longer than a small one runs; so :func:`repeated` keeps it with the plan,
for other tensors of the same forms. ``ringattn kernels`` builds the same calls on tensors without
memory and only compiles them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any

import numpy as np
import torch
from ringattn.kernels import Scores

from ringattn.planning.slices import Band

LOG2E = 1 / math.log(2)
# K/V (or Q/dO) of heads that run side by side should stay in the L2 cache: 50 MB on an H100.
L2_BYTES = 32 * 2**20
# Ranks may be threads. Triton's interpreter exchanges the functions of triton.language while it
# runs, a compiled kernel is not ready for a second thread while the first one loads it, and what is
# kept for a call is filled in for one launch at a time.
_ONE_AT_A_TIME = Lock()


class Tables:
    """int32 tables on a device. They go up from pinned memory, without a wait, on the stream that
    is current; :meth:`reach` makes another one wait for them."""

    def __init__(self, arrays: Sequence[np.ndarray], device: torch.device) -> None:
        self.device, self.stream = device, None
        if device.type != "cuda":
            self.parts = [torch.from_numpy(x).to(device) for x in arrays]
            return
        # One copy for all; each begins at 16 bytes, as compiled kernels count on.
        sizes = [-(-x.size // 4) * 4 for x in arrays]
        host = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=True)
        for x, room in zip(arrays, host.split(sizes), strict=True):
            room[: x.size] = torch.from_numpy(x).flatten()
        self.whole = host.to(device, non_blocking=True)
        rooms = self.whole.split(sizes)
        self.parts = [r[: x.size].view(x.shape) for x, r in zip(arrays, rooms, strict=True)]
        self.stream = torch.cuda.current_stream(device)
        self.up = self.stream.record_event()

    def reach(self) -> None:
        """Called before each launch that reads the tables."""
        if self.stream is None:
            return
        if torch._C._cuda_getCurrentRawStream(self.device.index) == self.stream.cuda_stream:
            return
        here = torch.cuda.current_stream(self.device)
        if not torch.cuda.is_current_stream_capturing():  # a capture begins when all is done
            here.wait_event(self.up)
        self.whole.record_stream(here)


@dataclass(frozen=True)
class Call:
    """``arguments`` by the kernel's names; ``options``: num_warps and the like; ``grid``: programs.

    ``counters``: how many int32 zeros each launch gets as the argument of that name. ``blank``:
    tensors of which the kernel does not write all rows, each with what these hold (None: zeros).
    ``tables``: where the work list lies.
    """

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    options: dict[str, Any]
    device: torch.device
    tables: Tables | None = None
    counters: int = 0
    blank: tuple[tuple[torch.Tensor, torch.Tensor | None], ...] = ()

    def run(self) -> None:
        """Once, on the tensors that it was put together for."""
        tensors = [x for pair in self.blank for x in pair]
        _Kept(self, tensors).run(tensors)


class _Kept:
    """A call without the tensors that it was put together for, which it would keep alive."""

    def __init__(self, call: Call, tensors: Sequence[torch.Tensor | None]) -> None:
        self.kernel, self.grid, self.options = call.kernel, call.grid, call.options
        self.device, self.tables, self.counters = call.device, call.tables, call.counters
        self.arguments = [call.arguments[name] for name in call.kernel.arg_names]
        self.compiled: Any = None
        place = {id(x): i for i, x in enumerate(tensors) if x is not None}
        # (place among the arguments, place among the tensors), and so for bases of descriptors
        self.direct, self.described = [], []
        for i, x in enumerate(self.arguments):
            if id(x) in place:
                self.direct.append((i, place[id(x)]))
                self.arguments[i] = None
            elif id(base := getattr(x, "base", None)) in place:
                self.arguments[i] = mine = copy(x)
                mine.base = None
                self.described.append((mine, place[id(base)]))
        if self.counters:
            self.counter = call.kernel.arg_names.index("counters")
        self.blank = [(place.get(id(to)), place.get(id(source))) for to, source in call.blank]

    def run(self, tensors: Sequence[torch.Tensor | None]) -> None:
        """On tensors of the same forms, in the same order."""
        for to, source in self.blank:
            tensors[to].zero_() if source is None else tensors[to].copy_(tensors[source])
        if not self.grid:
            return
        arguments = list(self.arguments)
        for i, which in self.direct:
            arguments[i] = tensors[which]
        if self.counters:
            arguments[self.counter] = torch.zeros(
                self.counters, dtype=torch.int32, device=self.device
            )
        with _ONE_AT_A_TIME, _on(self.device):
            if self.tables is not None:
                self.tables.reach()
            for descriptor, which in self.described:
                descriptor.base = tensors[which]
            if self.compiled is None:
                self.compiled = start(self.kernel, self.grid, arguments, self.options)
            else:  # past what Triton does to find the same kernel again
                self.compiled[self.grid, 1, 1](*arguments)
            for descriptor, _ in self.described:
                descriptor.base = None


def start(kernel: Any, grid: int, arguments: Sequence[Any], options: dict[str, Any]) -> Any:
    """Compiles and launches; the compiled kernel, or None where it was only interpreted."""
    return kernel[(grid,)](*arguments, **options)


def _on(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device, which need not be that of the tensors."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)


def repeated(
    kept: dict[Any, Any],
    key: Any,
    tensors: Sequence[torch.Tensor | None],
    make: Callable[[], Iterable[Call]],
) -> None:
    """Runs the calls that ``make`` puts together; or, where ``kept`` has them under this key for
    tensors of the same forms, those. Of the tensors nothing but their addresses may have gone into
    the calls that the forms and the key do not say.

    A form is what a compiled kernel counts on: shape, strides, dtype, device, and whether the
    address divides by 16.
    """
    names = [*map(id, tensors)]  # where one tensor is passed as two, it is the same two
    form = (key, tensors[0].device, *map(names.index, names), *map(_form, tensors))
    calls = kept.get(form)
    if calls is None:
        calls = kept[form] = [_Kept(call, tensors) for call in make()]
    for call in calls:
        call.run(tensors)


def _form(x: torch.Tensor | None) -> Any:
    return None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % 16)


def kept_with(bands: Sequence[Band]) -> dict[Any, Any]:
    """Where things are kept that belong to these bands: with the plan that they are of, if any."""
    return getattr(bands, "derived", {})


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU; torch takes its time to answer."""
    return torch.cuda.get_device_capability(device)


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
    """What belongs to these bands, kept with them."""
    kept = kept_with(bands)
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
