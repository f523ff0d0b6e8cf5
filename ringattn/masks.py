"""Masks: which (query, key) pairs exist, as a short list of band slices with exact algebra.

A slice is a run of queries x a run of keys x a band ``lo <= k - q <= hi``. A mask is a list of
disjoint slices, so its area (the number of pairs) is a sum, and nothing is ever of size L x L.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from operator import index

import numpy as np

from ringattn.runs import EMPTY, Run, floor_sum

_DENSE_LIMIT = 2**28


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
        parts = [Slice.make(q, self.k, self.lo, self.hi) for q in self.q - inner.q]
        parts += [Slice.make(inner.q, k, self.lo, self.hi) for k in self.k - inner.k]
        parts.append(Slice.make(inner.q, inner.k, self.lo, inner.lo - 1))
        parts.append(Slice.make(inner.q, inner.k, inner.hi + 1, self.hi))
        return [part for part in parts if part]

    def unit_step(self) -> list[tuple[Run, Run, int, int]]:
        """The slice as ``(q, k, lo, hi)`` with equal steps, the band counted in elements of the
        runs: element j of ``k`` belongs to element i of ``q`` iff ``lo <= j - i <= hi``.

        Kernels index tensors with the two runs and then see an ordinary band.
        """
        if not self:
            return []
        if len(self.q) == 1 or len(self.k) == 1 or self.is_full:
            # Any step will do where only one row or column exists, or the band is idle.
            if self.is_full:
                return [(self.q, self.k, -len(self.q), len(self.k))]
            runs = [(Run(x, x + 1), self.k) for x in self.q.to_array().tolist()]
            if len(self.k) == 1:
                runs = [(self.q.clip(self.k.start - self.hi, self.k.start - self.lo + 1), self.k)]
            pairs = [
                (q, k.clip(q.start + self.lo, q.last + self.hi + 1) if len(q) == 1 else k)
                for q, k in runs
            ]
            return [(q, k, -len(q), len(k)) for q, k in pairs if q and k]
        step = int(np.lcm(self.q.step, self.k.step))
        parts = []
        for q_from in range(self.q.start, min(self.q.stop, self.q.start + step), self.q.step):
            for k_from in range(self.k.start, min(self.k.stop, self.k.start + step), self.k.step):
                part = Slice.make(
                    Run(q_from, self.q.stop, step), Run(k_from, self.k.stop, step), self.lo, self.hi
                )
                if part:
                    shift = part.k.start - part.q.start
                    lo, hi = -((shift - part.lo) // step), (part.hi - shift) // step
                    parts.append((part.q, part.k, lo, hi))
        return parts


NOTHING = Slice(EMPTY, EMPTY, 0, 0)


@dataclass(frozen=True)
class Mask:
    """A set of (query, key) pairs over ``n_q`` queries and ``n_k`` keys: disjoint slices.

    Build one with the functions of this module; combine masks with ``&``, ``|`` and ``-``.
    """

    slices: tuple[Slice, ...]
    n_q: int
    n_k: int

    @cached_property
    def area(self) -> int:
        """Number of pairs (the attention FLOPs divided by 4 * heads * head_dim, forward)."""
        return sum(part.area for part in self.slices)

    def to_dense(self) -> np.ndarray:
        """bool array ``[n_q, n_k]``. For tests and pictures; ValueError beyond 2**28 pairs."""
        if self.n_q * self.n_k > _DENSE_LIMIT:
            raise ValueError(
                f"to_dense of {self.n_q} x {self.n_k} pairs would exceed 2**28 elements"
            )
        dense = np.zeros((self.n_q, self.n_k), dtype=bool)
        for part in self.slices:
            q, k = part.q.to_array(), part.k.to_array()
            apart = k[None, :] - q[:, None]
            dense[np.ix_(q, k)] |= (apart >= part.lo) & (apart <= part.hi)
        return dense

    def _check(self, other: Mask) -> None:
        if (self.n_q, self.n_k) != (other.n_q, other.n_k):
            raise ValueError(
                f"masks of different size: {self.n_q} x {self.n_k} and {other.n_q} x {other.n_k}"
            )

    def __and__(self, other: Mask) -> Mask:
        self._check(other)
        pairs = _meeting(self.slices, other.slices)
        parts = (part & one for part, near in pairs for one in near)
        return Mask(tuple(part for part in parts if part), self.n_q, self.n_k)

    def __or__(self, other: Mask) -> Mask:
        self._check(other)
        return Mask(self.slices + (other - self).slices, self.n_q, self.n_k)

    def __sub__(self, other: Mask) -> Mask:
        self._check(other)
        pairs = _meeting(self.slices, other.slices)
        left = (piece for part, holes in pairs for piece in _without(part, holes))
        return Mask(tuple(left), self.n_q, self.n_k)


def _meeting(
    slices: Iterable[Slice], others: Iterable[Slice]
) -> Iterator[tuple[Slice, list[Slice]]]:
    """Each slice with those of ``others`` whose queries reach into its own.

    A sweep along the queries: packed documents meet few others, however many there are.
    """
    ahead = sorted(others, key=_first_query, reverse=True)
    active: list[Slice] = []
    for part in sorted(slices, key=_first_query):
        while ahead and ahead[-1].q.start <= part.q.last:
            active.append(ahead.pop())
        active = [one for one in active if one.q.last >= part.q.start]
        yield part, [one for one in active if one.q.start <= part.q.last]


def _first_query(part: Slice) -> int:
    return part.q.start


def _without(part: Slice, holes: Iterable[Slice]) -> list[Slice]:
    left = [part]
    for hole in holes:
        left = [piece for one in left for piece in one - hole]
    return left


def _count(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)


def _parsed(given: Slice | tuple) -> Slice:
    try:
        q, k, lo, hi = (given.q, given.k, given.lo, given.hi) if isinstance(given, Slice) else given
        q, k = (run if isinstance(run, Run) else Run(*map(index, run)) for run in (q, k))
        lo, hi = (bound if bound is None else index(bound) for bound in (lo, hi))
        return Slice.make(q, k, lo, hi)
    except TypeError:
        raise ValueError(
            "a slice is Slice(q, k, lo, hi) or ((start, stop[, step]), (start, stop[, step]), "
            f"lo, hi); got {given!r}"
        ) from None


def full(n_q: int, n_k: int | None = None) -> Mask:
    """Every query sees every key; ``n_k`` defaults to ``n_q``."""
    n_q = _count("n_q", n_q, 0)
    n_k = n_q if n_k is None else _count("n_k", n_k, 0)
    return from_slices([Slice.make(Run(0, n_q), Run(0, n_k))], n_q, n_k)


def causal(n: int) -> Mask:
    """n queries over n keys, ``k <= q``."""
    n = _count("n", n, 0)
    return from_slices([Slice.make(Run(0, n), Run(0, n), None, 0)], n, n)


def sliding_window(n: int, window: int, causal: bool = True) -> Mask:
    """``0 <= q - k < window``, or ``|q - k| < window`` when not causal."""
    n, window = _count("n", n, 0), _count("window", window, 1)
    band = Slice.make(Run(0, n), Run(0, n), 1 - window, 0 if causal else window - 1)
    return from_slices([band], n, n)


def documents(lengths: Sequence[int], causal: bool = True) -> Mask:
    """Packed documents: each sees itself only (causally or whole)."""
    slices, start = [], 0
    for length in lengths:
        stop = start + _count("every document length", length, 0)
        run = Run(start, stop)
        slices.append(Slice.make(run, run, None, 0 if causal else None))
        start = stop
    return Mask(tuple(part for part in slices if part), start, start)


def prefix_lm(n: int, prefix: int) -> Mask:
    """The first ``prefix`` tokens see each other whole; the rest is causal."""
    n, prefix = _count("n", n, 0), _count("prefix", prefix, 0)
    if prefix > n:
        raise ValueError(f"prefix must be at most n = {n}, got {prefix}")
    head = Mask((Slice.make(Run(0, prefix), Run(0, prefix)),) if prefix else (), n, n)
    return head | causal(n)


def sinks(n: int, count: int) -> Mask:
    """Causal pairs whose key is one of the first ``count``."""
    n, count = _count("n", n, 0), _count("count", count, 0)
    return from_slices([Slice.make(Run(0, n), Run(0, min(n, count)), None, 0)], n, n)


def from_slices(slices: Iterable[Slice | tuple], n_q: int, n_k: int) -> Mask:
    """A mask from any slices; overlaps are counted once.

    A slice may also be written ``(queries, keys, lo, hi)`` with ``(start, stop)`` or
    ``(start, stop, step)`` for a run, and None where the band is open. Raises ValueError for
    anything else, and outside of the range.
    """
    n_q, n_k = _count("n_q", n_q, 0), _count("n_k", n_k, 0)
    parts = [part for given in slices if (part := _parsed(given))]
    for part in parts:
        if part.q.start < 0 or part.k.start < 0 or part.q.stop > n_q or part.k.stop > n_k:
            raise ValueError(f"{part} reaches outside of {n_q} queries x {n_k} keys")
    kept: list[Slice] = []
    active: list[Slice] = []
    for part in sorted(parts, key=_first_query):
        active = [one for one in active if one.q.last >= part.q.start]
        new = _without(part, active)
        active += new
        kept += new
    return Mask(tuple(kept), n_q, n_k)
