"""Slices and bands: the atoms of masks and of plans.

A :class:`Slice` says which pairs exist, in positions. A :class:`Band` says the same for a kernel:
it indexes two tensors with two runs and counts the band in elements of these runs, so a kernel
knows nothing of positions, steps or ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import gcd, lcm
from typing import Any

from ringattn.planning.runs import EMPTY, Run, floor_sum


@dataclass(frozen=True, slots=True)
class Band:
    """Pairs of element i of run ``q`` and element j of run ``k`` with ``lo <= j - i <= hi``."""

    q: Run
    k: Run
    lo: int
    hi: int

    @classmethod
    def make(cls, q: Run, k: Run, lo: int, hi: int) -> Band:
        """The band with sides that exclude nothing wide open: kernels see that they are idle."""
        lo = -len(q) if lo <= 1 - len(q) else lo
        hi = len(k) if hi >= len(k) - 1 else hi
        return cls(q, k, lo, hi)

    def __str__(self) -> str:
        text = f"queries {self.q} x rows {self.k}"
        return text if self.is_full else f"{text}, {self.lo} <= k - q <= {self.hi}"

    @property
    def is_full(self) -> bool:
        """True when the band excludes nothing: a plain rectangle."""
        return self.lo <= 1 - len(self.q) and self.hi >= len(self.k) - 1

    @property
    def area(self) -> int:
        """Number of pairs."""
        return Slice.make(Run(0, len(self.q)), Run(0, len(self.k)), self.lo, self.hi).area


class Bands(tuple[Band, ...]):
    """What one step computes. ``derived`` is a place for what a kernel works out from it once,
    as its work lists; it lives as long as the plan."""

    def __reduce__(self) -> tuple:
        """Copies, and other processes, derive their own."""
        return Bands, (tuple(self),)

    @cached_property
    def derived(self) -> dict[Any, Any]:
        return {}

    @cached_property
    def halves(self) -> tuple[Bands, Bands]:
        """The bands in two parts, of which the second may be empty."""
        half = len(self) - len(self) // 2
        return Bands(self[:half]), Bands(self[half:])


@dataclass(frozen=True, slots=True)
class Slice:
    """The pairs (q, k) with q in run ``q``, k in run ``k`` and ``lo <= k - q <= hi``.

    ``lo`` and ``hi`` are clipped to what the runs can reach; an empty slice is falsy.
    """

    q: Run
    k: Run
    lo: int
    hi: int

    @classmethod
    def make(cls, q: Run, k: Run, lo: int | None = None, hi: int | None = None) -> Slice:
        """The slice in tight form: no row or key at either end is without a pair (step-1 runs).

        ``None`` leaves that side of the band open.
        """
        while True:
            if not q or not k:
                return NOTHING
            low = k.start - q.last if lo is None else max(lo, k.start - q.last)
            high = k.last - q.start if hi is None else min(hi, k.last - q.start)
            # Of all differences k - q only one residue class occurs.
            common, first = gcd(q.step, k.step), k.start - q.start
            low += (first - low) % common
            high -= (high - first) % common
            if low > high:
                return NOTHING
            tight_q = q.clip(k.start - high, k.last - low + 1)
            tight_k = k.clip(q.start + low, q.last + high + 1)
            if tight_q == q and tight_k == k:
                return cls(q, k, low, high)
            q, k, lo, hi = tight_q, tight_k, low, high

    def __bool__(self) -> bool:
        return bool(self.q)

    def __str__(self) -> str:
        text = f"queries {self.q} x keys {self.k}"
        return text if self.is_full else f"{text}, {self.lo} <= k - q <= {self.hi}"

    @property
    def is_full(self) -> bool:
        """True when the band excludes nothing: a plain rectangle."""
        return self.lo <= self.k.start - self.q.last and self.hi >= self.k.last - self.q.start

    @property
    def area(self) -> int:
        """Number of pairs, in closed form."""
        if not self:
            return 0
        if self.is_full:
            return len(self.q) * len(self.k)
        return self._pairs_below(self.hi) - self._pairs_below(self.lo - 1)

    def _pairs_below(self, bound: int) -> int:
        """Pairs with ``k - q <= bound``: a sum of clipped floors, cut where the clip starts."""
        # Keys for query q: clip((q + bound - k.start) // k.step + 1, 0, len(k)).
        nothing_until = self.k.start - bound  # the first q with a key
        everything_from = self.k.start + (len(self.k) - 1) * self.k.step - bound
        sloped = self.q.clip(nothing_until, everything_from)
        saturated = len(self.q.clip(max(nothing_until, everything_from), self.q.stop))
        offset = sloped.start + bound - self.k.start + self.k.step
        return saturated * len(self.k) + floor_sum(len(sloped), self.k.step, sloped.step, offset)

    def __and__(self, other: Slice) -> Slice:
        if (
            self.q.start > other.q.last
            or other.q.start > self.q.last
            or self.k.start > other.k.last
            or other.k.start > self.k.last
        ):
            return NOTHING
        lo, hi = max(self.lo, other.lo), min(self.hi, other.hi)
        if lo > hi:
            return NOTHING
        return Slice.make(self.q & other.q, self.k & other.k, lo, hi)

    def __sub__(self, other: Slice) -> list[Slice]:
        """The pairs of this slice that ``other`` lacks, as disjoint slices."""
        inner = self & other
        if not inner:
            return [self] if self else []
        if self.q & other.q == self.q and self.k & other.k == self.k:
            # Only the band cuts: what is left lies on its two sides.
            sides = (self.lo, other.lo - 1), (other.hi + 1, self.hi)
            parts = [Slice.make(self.q, self.k, lo, hi) for lo, hi in sides]
            return [part for part in parts if part]
        parts = [Slice.make(q, self.k, self.lo, self.hi) for q in self.q - inner.q]
        parts += [Slice.make(inner.q, k, self.lo, self.hi) for k in self.k - inner.k]
        parts.append(Slice.make(inner.q, inner.k, self.lo, inner.lo - 1))
        parts.append(Slice.make(inner.q, inner.k, inner.hi + 1, self.hi))
        return [part for part in parts if part]

    def bands(self) -> list[Band]:
        """The slice as disjoint bands: cut until the two runs of each have equal steps, or until
        one has a single element or the band is idle, where steps do not matter."""
        if not self:
            return []
        if self.q.step == self.k.step == 1:
            shift = self.k.start - self.q.start
            return [Band.make(self.q, self.k, self.lo - shift, self.hi - shift)]
        if len(self.q) == 1 or len(self.k) == 1 or self.is_full:
            # Any step will do where only one row or column exists, or the band is idle.
            if self.is_full:
                return [Band(self.q, self.k, -len(self.q), len(self.k))]
            runs = [(Run(x, x + 1), self.k) for x in self.q.to_array().tolist()]
            if len(self.k) == 1:
                runs = [(self.q.clip(self.k.start - self.hi, self.k.start - self.lo + 1), self.k)]
            pairs = [
                (q, k.clip(q.start + self.lo, q.last + self.hi + 1) if len(q) == 1 else k)
                for q, k in runs
            ]
            return [Band(q, k, -len(q), len(k)) for q, k in pairs if q and k]
        step = lcm(self.q.step, self.k.step)
        parts = []
        for q_from in range(self.q.start, min(self.q.stop, self.q.start + step), self.q.step):
            for k_from in range(self.k.start, min(self.k.stop, self.k.start + step), self.k.step):
                part = Slice.make(
                    Run(q_from, self.q.stop, step), Run(k_from, self.k.stop, step), self.lo, self.hi
                )
                if part:
                    shift = part.k.start - part.q.start
                    lo, hi = -((shift - part.lo) // step), (part.hi - shift) // step
                    parts.append(Band.make(part.q, part.k, lo, hi))
        return parts


NOTHING = Slice(EMPTY, EMPTY, 0, 0)
