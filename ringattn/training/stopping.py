"""Requests to stop: heard at once, served by all ranks together, also within a long step."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ringattn.context import Context

LONG_S = 5.0  # of a step, after which ranks ask each other whether to go on


class Stop(Exception):
    """Raised on all ranks, at the same layer of the same pass."""


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that receives every SIGTERM and SIGINT; the old handlers return afterwards."""
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Asking:
    """Within a step, after a layer in its forward, its recomputation or its backward, ranks ask
    each other about every ``LONG_S`` seconds whether one is to stop. Rarely, since ranks that need
    not meet there have their slack; and by counting layers, since clocks differ.

    ``blocks``: the layers, alike on all ranks. Use as a context manager around a step, which then
    raises Stop; nothing but gradients has changed by then.
    """

    def __init__(self, context: Context, stops: list[int], blocks: Sequence[nn.Module]) -> None:
        self.context, self.stops = context, stops
        self.passed, self.every, self.active = 0, 1, False
        for block in blocks:
            block.register_forward_hook(self._after)

    def within(self, seconds: float) -> Asking:
        """A step that is expected to take so long: inf where nobody knows."""
        often = 1 if seconds == math.inf else math.ceil(LONG_S * self.passed / seconds)
        self.every = max(1, often)
        return self

    def silence(self, seconds: float) -> float:
        """The longest time without a question, in steps like the last one, which took so long."""
        return min(seconds, max(LONG_S, seconds / max(1, self.passed)))

    def __enter__(self) -> Asking:
        self.passed, self.active = 0, True
        return self

    def __exit__(self, *error: object) -> None:
        self.active = False

    def _after(self, block: nn.Module, given: Any, output: Any) -> None:
        x = output if isinstance(output, torch.Tensor) else output[0]
        if not self.active or not torch.is_grad_enabled():
            return
        self._layer()
        if x.requires_grad:
            x.register_hook(self._layer)

    def _layer(self, grad: torch.Tensor | None = None) -> None:
        self.passed += 1
        if self.passed % self.every == 0 and self.context.total(len(self.stops))[0]:
            raise Stop
