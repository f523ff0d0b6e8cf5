"""Requests to stop: heard at once, served by all ranks together, also within a long step."""

from __future__ import annotations

import math
import signal
import socket
import time
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from ringattn.context import Context

LONG_S = 5.0  # of a step, after which ranks ask each other whether to go on


class Stop(Exception):
    """Raised on all ranks, at the same layer of the same pass."""


_HEARD = (signal.SIGTERM, signal.SIGINT)


class Requests:
    """How many have come: its length."""

    def __init__(self, numbers: socket.socket) -> None:
        self.numbers, self.count = numbers, 0

    def __len__(self) -> int:
        with suppress(BlockingIOError):
            self.count += sum(number in _HEARD for number in self.numbers.recv(4096))
        return self.count


@contextmanager
def stop_requests() -> Iterator[Requests]:
    """SIGTERM and SIGINT from here on; the old handlers return afterwards. Of a main thread only,
    but heard on any: handlers in Python would not run while that waits in a backward, which a GPU's
    thread goes through."""
    ours, theirs = socket.socketpair()
    for each in (ours, theirs):
        each.setblocking(False)
    before = {number: signal.signal(number, lambda number, frame: None) for number in _HEARD}
    wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    try:
        yield Requests(ours)
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        ours.close()
        theirs.close()


class Asking:
    """Within a step, after a layer in its forward or its backward, ranks ask each other about every
    ``LONG_S`` seconds whether one is to stop. Rarely, since ranks that need not meet there have
    their slack; and by counting layers, since clocks differ.

    ``blocks``: the layers, alike on all ranks. Use as a context manager around a step, which then
    raises Stop; nothing but gradients has changed by then. ``silence``: the longest time without a
    question in the last step, its begin and its end being two; seconds.
    """

    def __init__(self, context: Context, stops: Sized, blocks: Sequence[nn.Module]) -> None:
        self.context, self.stops = context, stops
        self.passed, self.every, self.active = 0, 1, False
        self.silence = self.asked = 0.0
        for block in blocks:
            block.register_forward_hook(self._after)

    def within(self, seconds: float) -> Asking:
        """A step that is expected to take so long: inf where nobody knows."""
        often = 1 if seconds == math.inf else math.ceil(LONG_S * self.passed / seconds)
        self.every = max(1, often)
        return self

    def __enter__(self) -> Asking:
        self.passed, self.active = 0, True
        self.silence, self.asked = 0.0, time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self._heard()
        self.active = False

    def _heard(self) -> None:
        now = time.perf_counter()
        self.silence, self.asked = max(self.silence, now - self.asked), now

    def _after(self, block: nn.Module, given: Any, output: Any) -> None:
        x = output if isinstance(output, torch.Tensor) else output[0]
        if not self.active or not torch.is_grad_enabled():
            return
        self._layer()
        if x.requires_grad:
            x.register_hook(self._layer)

    def _layer(self, grad: torch.Tensor | None = None) -> None:
        self.passed += 1
        if self.passed % self.every == 0:
            self._heard()
            if self.context.total(len(self.stops))[0]:
                raise Stop
