"""Blocks of tokens, of which a layer knows summaries: where they lie, who owns their summaries, and
who may see which of them.

Blocks begin anew in each document and may straddle ranks. A *piece* is what a rank's run has of a
block: it is summarised where it is, and the summaries of pieces go to the owner of the block, the
rank of its last token. Summaries are keys with a layout of their own, and masks over them are
slices with n_q != n_k.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

from ringattn.planning import masks
from ringattn.planning.layouts import Layout
from ringattn.planning.masks import Mask
from ringattn.planning.plan import Plan
from ringattn.planning.runs import Run, integer
from ringattn.planning.slices import Slice
from ringattn.planning.state_exchange import Relayout

T = TypeVar("T")


@dataclass(frozen=True)
class Pieces:
    """Arrays over all pieces, by block and then by position: their ``rank`` and ``block``, and
    their rows on that rank, ``first`` up to ``stop``."""

    rank: np.ndarray
    block: np.ndarray
    first: np.ndarray
    stop: np.ndarray


class Blocks:
    """Of ``size`` tokens each, one every ``stride`` tokens (by default: side by side), over
    documents of these ``lengths``; the last of a document may be shorter. ``ulysses``: over how
    many neighbouring ranks heads are split.

    Make it with :func:`ringattn.make_blocks`, once per batch; what is derived from it is kept with
    it. Raises ValueError for a layout whose runs are not contiguous, or of other tokens.
    """

    def __init__(
        self,
        layout: Layout,
        lengths: Sequence[int],
        size: int,
        stride: int | None = None,
        ulysses: int = 1,
    ) -> None:
        if layout.step != 1:
            raise ValueError(
                f"layout {layout.name!r} scatters every block over all ranks; choose contiguous, "
                "zigzag or balanced"
            )
        if sum(lengths) != layout.n:
            raise ValueError(f"documents of {sum(lengths)} tokens on a layout of {layout.n}")
        self.layout, self.lengths, self.ulysses = layout, tuple(lengths), ulysses
        self.size = integer("size", size, 1)
        self.stride = self.size if stride is None else integer("stride", stride, 1)
        if self.stride > self.size:
            raise ValueError(f"stride={stride} would leave out tokens between blocks of {size}")
        ends = np.cumsum(np.array(self.lengths, np.int64))
        counts = -(-np.array(self.lengths, np.int64) // self.stride)
        self.document = np.repeat(np.arange(len(counts)), counts)
        # Of each document: its first block, one after its last, its first token.
        self.lasts = np.cumsum(counts)
        self.firsts, self.begins = self.lasts - counts, ends - np.array(self.lengths, np.int64)
        within = np.arange(int(counts.sum())) - self.firsts[self.document]
        self.starts = self.begins[self.document] + within * self.stride
        self.stops = np.minimum(self.starts + self.size, ends[self.document])
        self._remembered: dict[Hashable, Any] = {}

    def __len__(self) -> int:
        return len(self.starts)

    def __str__(self) -> str:
        every = "" if self.stride == self.size else f", one every {self.stride}"
        straddling = len(self.pieces.rank) - len(self)
        return (
            f"{len(self)} blocks of {self.size} tokens{every}, {len(self.lengths)} documents, "
            f"{self.layout.name} over {self.world} ranks; {straddling} pieces go to another rank"
            f" or run"
        )

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.layout.world

    def remember(self, key: Hashable, work: Callable[[], T]) -> T:
        """The result of ``work``, done once for a ``key``."""
        if key not in self._remembered:
            self._remembered[key] = work()
        return self._remembered[key]

    def of(self, size: int, stride: int | None = None) -> Blocks:
        """Blocks of another ``size`` (in tokens, one every ``stride``) over the same tokens."""
        if (size, stride or size) == (self.size, self.stride):
            return self
        make = Blocks
        return self.remember(
            ("of", size, stride),
            lambda: make(self.layout, self.lengths, size, stride, self.ulysses),
        )

    @cached_property
    def of_groups(self) -> Blocks:
        """The same of groups of ``ulysses`` ranks, each as if it were one rank."""
        merged = self.layout.merged(self.ulysses, join=True)
        return Blocks(merged, self.lengths, self.size, self.stride)

    @cached_property
    def pieces(self) -> Pieces:
        """What each rank has of each block."""
        rows = []
        for rank in self.layout.ranks:
            for offset, run in self.layout.numbered(rank):
                low = int(np.searchsorted(self.stops, run.start, side="right"))
                high = int(np.searchsorted(self.starts, run.last, side="right"))
                block = np.arange(low, high)
                first = np.maximum(self.starts[block], run.start)
                stop = np.minimum(self.stops[block], run.stop)
                to_rows = offset - run.start
                each = (np.full(len(block), rank), block, first + to_rows, stop + to_rows, first)
                rows.append(np.stack(each))
        rank, block, first, stop, position = np.concatenate(rows, 1)
        order = np.lexsort((position, block))
        return Pieces(*(x[order] for x in (rank, block, first, stop)))

    @cached_property
    def owner(self) -> np.ndarray:
        """Per block, the rank of its last token."""
        owner = np.zeros(len(self), np.int64)
        owner[self.pieces.block] = self.pieces.rank  # the last piece of a block is written last
        return owner

    def summaries(self, slots: int = 1) -> Layout:
        """Who owns the summaries, ``slots`` of each block, one block's after another's."""
        return self.remember(
            ("summaries", slots), lambda: layout_of(np.repeat(self.owner, slots), self.world)
        )

    @cached_property
    def move(self) -> Relayout:
        """Of summaries of pieces, to the owners of the blocks."""
        owners = self.owner[self.pieces.block]
        return Relayout(layout_of(self.pieces.rank, self.world), layout_of(owners, self.world))

    def plan(self, mask: Mask, keys: Layout | None = None) -> Plan:
        """For a ``mask`` of the tokens' queries over ``keys`` (None: the tokens). Each rank
        receives the rows that it attends."""
        return self.remember(("plan", mask, keys), lambda: self.new_plan(mask, keys))

    def new_plan(self, mask: Mask, keys: Layout | None = None) -> Plan:
        """:meth:`plan` of a ``mask`` over ``keys``, not kept."""
        keys = keys or self.layout
        return Plan(mask, self.layout, keys, "direct", self.ulysses, self.world)

    # Masks of tokens over tokens

    @cached_property
    def documents(self) -> Mask:
        """All tokens before it, of its document."""
        return masks.documents(self.lengths)

    def near(self, count: int = 1, causal: bool = True) -> Mask:
        """The token's own block and ``count - 1`` before it (not causal: on both sides)."""
        return self.remember(("near", count, causal), lambda: self._near(count, causal))

    def _near(self, count: int, causal: bool) -> Mask:
        self._side_by_side("near")
        before = np.maximum(np.arange(len(self)) - (count - 1), self.firsts[self.document])
        after = np.arange(len(self)) + (0 if causal else count - 1)
        after = np.minimum(after, self.lasts[self.document] - 1)
        parts = (
            Slice.make(Run(a, b), Run(c, d), None, 0 if causal else None)
            for a, b, c, d in _rows(self.starts, self.stops, self.starts[before], self.stops[after])
        )
        return Mask(tuple(parts), self.layout.n, self.layout.n)

    def window(self, window: int) -> Mask:
        """The last ``window`` tokens of its document, itself included."""
        return self.remember(
            ("window", window),
            lambda: self.documents & masks.sliding_window(self.layout.n, window),
        )

    def back(self, nearest: int, furthest: int) -> Mask:
        """From ``nearest`` to ``furthest`` tokens back, of its document."""
        whole = Run(0, self.layout.n)
        band = Slice.make(whole, whole, -furthest, -nearest)
        return self.documents & Mask((band,) * bool(band), self.layout.n, self.layout.n)

    # Masks of tokens over summaries

    def past(self, near: int = 1, coarser: Blocks | None = None, slots: int = 1) -> Mask:
        """All blocks (``slots`` summaries of each) of its document before the ``near`` nearest (see
        :meth:`near`), so that every earlier token counts once; with ``coarser`` ones, which
        summarise what is further away, only those that their own :meth:`past` leaves."""
        return self.remember(
            ("past", near, coarser and coarser.size, slots),
            lambda: self._past(near, coarser, slots),
        )

    def _past(self, near: int, coarser: Blocks | None, slots: int) -> Mask:
        self._side_by_side("past")
        own = np.arange(len(self))
        first, stop = self.firsts[self.document], np.maximum(own - near + 1, 0)
        if coarser is not None:
            if coarser.size % self.size:
                raise ValueError(
                    f"blocks of {coarser.size} tokens are not made of blocks of {self.size}"
                )
            ratio = coarser.size // self.size
            within = own - first
            first = first + np.maximum(0, within // ratio - near + 1) * ratio
        return self._over(self.starts, self.stops, first, stop, slots)

    def ended(self, slots: int = 1) -> Mask:
        """All blocks (``slots`` summaries of each) of its document that have ended, with the token
        itself or before it."""
        last = np.arange(len(self)) == self.lasts[self.document] - 1
        until = np.where(last, self.stops, np.append(self.stops[1:], 0) - 1)
        first, seen = self.firsts[self.document], np.arange(len(self)) + 1
        return self._over(self.stops - 1, until, first, seen, slots)

    def whole(self, slots: int = 1) -> Mask:
        """All blocks (``slots`` summaries of each) of its document."""
        begins, lengths = self.begins, np.array(self.lengths, np.int64)
        return self._over(begins, begins + lengths, self.firsts, self.lasts, slots)

    def _over(self, q0: np.ndarray, q1: np.ndarray, k0: np.ndarray, k1: np.ndarray,
              slots: int) -> Mask:  # fmt: skip
        parts = (
            Slice.make(Run(a, b), Run(c * slots, d * slots)) for a, b, c, d in _rows(q0, q1, k0, k1)
        )
        return Mask(tuple(part for part in parts if part), self.layout.n, len(self) * slots)

    def _side_by_side(self, what: str) -> None:
        if self.stride != self.size:
            raise ValueError(f"{what}: blocks that overlap (stride {self.stride} of {self.size})")


def _rows(*columns: np.ndarray) -> Any:
    return zip(*(column.tolist() for column in columns), strict=True)


def layout_of(owner: np.ndarray, world: int) -> Layout:
    """The layout in which element i is ``owner[i]``'s."""
    edges = [0, *(np.flatnonzero(np.diff(owner)) + 1).tolist(), len(owner)]
    runs: list[list[Run]] = [[] for _ in range(world)]
    for start, stop in pairwise(edges):
        if stop > start:
            runs[int(owner[start])].append(Run(start, stop))
    return Layout(len(owner), tuple(map(tuple, runs)), "blocks")
