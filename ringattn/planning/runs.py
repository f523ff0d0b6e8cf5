"""Runs: finite arithmetic progressions of integers, and exact set algebra on them.

A run stands for the set ``{start, start + step, ...}`` below ``stop``. Masks, layouts and
plans are all made of runs, so nothing in planning is as long as the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import numpy as np


@dataclass(frozen=True, slots=True)
class Run:
    """``start, start + step, ...`` strictly below ``stop``; kept in the form stop = last + 1.

    An empty run is always ``Run(0, 0, 1)``; a run of one element has step 1. Equal sets are
    therefore equal objects. Raises ValueError for a step below 1.
    """

    start: int
    stop: int
    step: int = 1

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ValueError(f"Run step must be at least 1, got {self.step}")
        count = len(range(self.start, self.stop, self.step))
        start = self.start if count else 0
        stop = self.start + (count - 1) * self.step + 1 if count else 0
        object.__setattr__(self, "start", start)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "step", self.step if count > 1 else 1)

    def __len__(self) -> int:
        return len(range(self.start, self.stop, self.step))

    def __bool__(self) -> bool:
        return self.stop > self.start

    def __str__(self) -> str:
        """As a slice of Python: start:stop or start:stop:step."""
        return f"{self.start}:{self.stop}" + (f":{self.step}" if self.step > 1 else "")

    @property
    def last(self) -> int:
        return self.stop - 1

    def to_array(self) -> np.ndarray:
        """All elements as an int64 array."""
        return np.arange(self.start, self.stop, self.step, dtype=np.int64)

    def clip(self, low: int, high: int) -> Run:
        """The elements ``low <= x < high``."""
        skipped = max(0, -((self.start - low) // self.step))
        return Run(self.start + skipped * self.step, min(self.stop, high), self.step)

    def __and__(self, other: Run) -> Run:
        """Intersection, by the Chinese remainder theorem."""
        if not self or not other or self.start > other.last or other.start > self.last:
            return EMPTY
        low, high = max(self.start, other.start), min(self.stop, other.stop)
        if self.step == other.step == 1:
            return Run(low, high)
        common = gcd(self.step, other.step)
        apart = other.start - self.start
        if apart % common:
            return EMPTY
        period = self.step // common * other.step
        modulus = other.step // common
        turns = apart // common * pow(self.step // common, -1, modulus) % modulus
        meeting = self.start + turns * self.step
        return Run(meeting + -((meeting - low) // period) * period, high, period)

    def __sub__(self, other: Run) -> list[Run]:
        """The elements of this run that are not in ``other``, as disjoint runs."""
        inner = self & other
        if not inner:
            return [self] if self else []
        ratio = inner.step // self.step if len(inner) > 1 else 1
        between = [
            Run(inner.start + i * self.step, inner.stop, inner.step) for i in range(1, ratio)
        ]
        parts = [self.clip(self.start, inner.start), *between, self.clip(inner.stop, self.stop)]
        return [part for part in parts if part]


EMPTY = Run(0, 0)


def integer(name: str, value: object, least: int) -> int:
    """``value`` as an int; ValueError that names the argument if it is none, or below ``least``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)


def floor_sum(count: int, divisor: int, slope: int, offset: int) -> int:
    """``sum((slope * i + offset) // divisor for i in range(count))`` in O(log) steps.

    Lattice points under a line, by the Euclidean algorithm (Graham, Knuth, Patashnik,
    "Concrete Mathematics", 3.5). divisor > 0; slope and offset may be negative.
    """
    total = 0
    while count > 0:
        total += (slope // divisor) * (count * (count - 1) // 2) + (offset // divisor) * count
        slope, offset = slope % divisor, offset % divisor
        top = slope * count + offset
        if top < divisor:
            break
        count, offset = divmod(top, divisor)
        divisor, slope = slope, divisor
    return total
