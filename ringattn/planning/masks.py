"""Masks: which (query, key) pairs exist, as a short list of band slices with exact algebra.

A slice is a run of queries x a run of keys x a band ``lo <= k - q <= hi``. A mask is a list of
disjoint slices, so its area (the number of pairs) is a sum, and nothing is ever of size L x L.

In all builders ``n`` is the number of tokens, all lengths, windows and distances are in tokens, and
``causal`` keeps only keys that are not after the query. Builders raise ValueError for what makes no
mask, naming the argument.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from operator import index
from typing import Any

import numpy as np

from ringattn.planning.intervals import progressions, union
from ringattn.planning.runs import Run, integer
from ringattn.planning.slices import Slice

_DENSE_LIMIT = 2**28
_SHOWN = 8  # slices that a printed mask shows


@dataclass(frozen=True)
class Mask:
    """A set of (query, key) pairs over ``n_q`` queries and ``n_k`` keys: disjoint slices.

    Build one with the functions of this module; combine masks with ``&``, ``|`` and ``-``.
    """

    slices: tuple[Slice, ...]
    n_q: int
    n_k: int

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        first = "".join(f"\n  {part}" for part in self.slices[:_SHOWN])
        more = len(self.slices) - _SHOWN
        rest = f"\n  and {more} slices more" if more > 0 else ""
        return f"{self.area} of {self.n_q} x {self.n_k} pairs{first}{rest}"

    @cached_property
    def _hash(self) -> int:
        # Plans are kept by mask: thousands of slices are hashed once.
        return hash((self.slices, self.n_q, self.n_k))

    @cached_property
    def area(self) -> int:
        """Number of pairs (the attention FLOPs divided by 4 * heads * head_dim, forward)."""
        return sum(part.area for part in self.slices)

    @cached_property
    def pieces(self) -> list[int]:
        """Lengths of the shortest pieces of the sequence between which there are no pairs: of
        packed documents, their lengths. ValueError if queries and keys are not the same tokens."""
        return pieces([self])

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


def pieces(masks: Iterable[Mask]) -> list[int]:
    """:attr:`Mask.pieces` of the union of masks of one length."""
    spans, n = [], 0
    for mask in masks:
        n = mask.n_q
        if mask.n_q != mask.n_k:
            raise ValueError(f"{mask.n_q} queries and {mask.n_k} keys are not one sequence")
        spans += [
            (min(part.q.start, part.k.start), max(part.q.last, part.k.last))
            for part in mask.slices
            if (part.lo, part.hi) != (0, 0)  # of a token and itself nothing is joined
        ]
    lengths, begin, end = [], 0, 0
    for first, last in (*sorted(spans), (n, n - 1)):
        if first >= end:  # nothing before reaches here
            lengths += [end - begin] if end > begin else []
            lengths += [1] * (first - end)  # tokens without any pair
            begin = end = first
        end = max(end, last + 1)
    return lengths


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


def _parsed(item: Slice | tuple[Any, ...]) -> Slice:
    try:
        q, k, lo, hi = (item.q, item.k, item.lo, item.hi) if isinstance(item, Slice) else item
        runs = [run if isinstance(run, Run) else tuple(map(index, run)) for run in (q, k)]
        q, k = (run if isinstance(run, Run) else Run(*run) for run in runs)
        lo, hi = (bound if bound is None else index(bound) for bound in (lo, hi))
    except (TypeError, ValueError):
        raise ValueError(
            "a slice is Slice(q, k, lo, hi) or ((start, stop[, step]), (start, stop[, step]), "
            f"lo, hi); got {item!r}"
        ) from None
    if not isinstance(item, Slice):  # written by somebody: what is there is meant
        for run in runs:
            if not isinstance(run, Run) and not 0 <= run[0] <= run[1]:
                raise ValueError(
                    f"{item!r}: a run is start, stop with 0 <= start <= stop; nothing counts from "
                    f"the end; got {run}"
                )
        if lo is not None and hi is not None and lo > hi:
            raise ValueError(f"{item!r}: no k - q is at least {lo} and at most {hi}")
    return Slice.make(q, k, lo, hi)


def _listed(values: Iterable[int]) -> list[int]:
    """A list, an array or a CPU tensor of integers as Python integers."""
    try:
        return [x.item() if hasattr(x, "item") else x for x in values]
    except TypeError:
        raise ValueError(f"a list of integers is needed, got {values!r}") from None


def full(n_q: int, n_k: int | None = None) -> Mask:
    """Every query sees every key; ``n_k`` defaults to ``n_q``."""
    n_q = integer("n_q", n_q, 0)
    n_k = n_q if n_k is None else integer("n_k", n_k, 0)
    return from_slices([Slice.make(Run(0, n_q), Run(0, n_k))], n_q, n_k)


def causal(n: int, n_k: int | None = None) -> Mask:
    """n queries over n keys, ``k <= q``. With ``n_k`` keys, the queries are the last n of n_k
    tokens, so the last query sees the last key: ``k <= q + n_k - n``."""
    n = integer("n", n, 0)
    n_k = n if n_k is None else integer("n_k", n_k, 0)
    return from_slices([Slice.make(Run(0, n), Run(0, n_k), None, n_k - n)], n, n_k)


def sliding_window(n: int, window: int, causal: bool = True) -> Mask:
    """``0 <= q - k < window``, or ``|q - k| < window`` when not causal."""
    n, window = integer("n", n, 0), integer("window", window, 1)
    band = Slice.make(Run(0, n), Run(0, n), 1 - window, 0 if causal else window - 1)
    return from_slices([band], n, n)


def documents(lengths: Sequence[int], causal: bool = True) -> Mask:
    """Packed documents of these ``lengths``: each sees itself only."""
    lengths = [integer("every document length", length, 0) for length in _listed(lengths)]
    runs = [Run(at, at + x) for at, x in zip(accumulate(lengths, initial=0), lengths, strict=False)]
    n = sum(lengths)
    return Mask(tuple(Slice.make(r, r, None, 0 if causal else None) for r in runs if r), n, n)


def side_by_side(parts: Sequence[Mask]) -> Mask:
    """``parts``: masks of several sequences laid end to end. Each sees itself only, by its own."""
    slices: list[Slice] = []
    n_q = n_k = 0
    for part in parts:
        apart = n_k - n_q
        slices += [
            Slice(_moved(s.q, n_q), _moved(s.k, n_k), s.lo + apart, s.hi + apart)
            for s in part.slices
        ]
        n_q, n_k = n_q + part.n_q, n_k + part.n_k
    return Mask(tuple(slices), n_q, n_k)


def _moved(run: Run, by: int) -> Run:
    return Run(run.start + by, run.stop + by, run.step)


def from_cu_seqlens(cu_seqlens: Sequence[int], causal: bool = True) -> Mask:
    """Packed documents from their boundaries, ``cu_seqlens`` ``[0, end, end, ..., n]``, as varlen
    kernels take them (a list, an array or a CPU tensor)."""
    ends = np.asarray(cu_seqlens)
    if ends.ndim != 1 or not len(ends) or ends[0] or (np.diff(ends.astype(np.int64)) < 0).any():
        raise ValueError(f"cu_seqlens must ascend from 0, got {cu_seqlens!r}")
    return documents(np.diff(ends).tolist(), causal)


def from_document_ids(ids: Sequence[int], causal: bool = True) -> Mask:
    """Tokens with equal ids see each other; ``ids`` ``[n]`` need not be sorted. A negative id is
    padding: it sees nothing and is seen by nothing."""
    array = np.asarray(ids)
    if array.ndim != 1 or (len(array) and array.dtype.kind not in "iu"):
        raise ValueError(f"document ids must be n integers, got {array.dtype} {list(array.shape)}")
    firsts = np.flatnonzero(np.diff(array, prepend=array[:1] - 1)) if len(array) else array
    stops = [*firsts[1:].tolist(), len(array)]
    places: dict[int, list[Run]] = {}
    for start, stop in zip(firsts.tolist(), stops, strict=False):
        places.setdefault(int(array[start]), []).append(Run(start, stop))
    hi = 0 if causal else None
    pairs = (
        Slice.make(q, k, None, hi)
        for document, runs in places.items()
        if document >= 0
        for q in runs
        for k in runs
    )
    return Mask(tuple(part for part in pairs if part), len(array), len(array))


def prefix_lm(n: int, prefix: int) -> Mask:
    """The first ``prefix`` tokens see each other whole; the rest is causal."""
    n, prefix = integer("n", n, 0), integer("prefix", prefix, 0)
    if prefix > n:
        raise ValueError(f"prefix must be at most n = {n}, got {prefix}")
    head = Mask((Slice.make(Run(0, prefix), Run(0, prefix)),) if prefix else (), n, n)
    return head | causal(n)


def shared_question(prompt: int, answers: Sequence[int]) -> Mask:
    """A prompt of ``prompt`` tokens, then several answers laid end to end: each sees the prompt and
    itself, causally, and no other answer."""
    prompt = integer("prompt", prompt, 0)
    answers = [integer("every answer length", length, 0) for length in _listed(answers)]
    n = prompt + sum(answers)
    shared = Slice.make(Run(0, n), Run(0, prompt), None, 0)
    ends = accumulate(answers, initial=prompt)
    own = [Run(at, at + x) for at, x in zip(ends, answers, strict=False)]
    parts = [shared, *(Slice.make(run, run, None, 0) for run in own)]
    return Mask(tuple(part for part in parts if part), n, n)


def sinks(n: int, count: int) -> Mask:
    """Causal pairs whose key is one of the first ``count``."""
    n, count = integer("n", n, 0), integer("count", count, 0)
    return from_slices([Slice.make(Run(0, n), Run(0, min(n, count)), None, 0)], n, n)


def global_tokens(n: int, tokens: int | Sequence[int], causal: bool = False) -> Mask:
    """Pairs whose query or key is a global token (Beltagy et al. 2020, "Longformer"): the first
    ``tokens`` of the sequence, or the positions listed. Combine with a local mask by ``|``."""
    n = integer("n", n, 0)
    if isinstance(tokens, (int, np.integer)):
        tokens = range(min(n, integer("tokens", tokens, 0)))
    tokens = sorted({integer("every global token", x, 0) for x in _listed(tokens)})
    if tokens and tokens[-1] >= n:
        raise ValueError(f"every global token must be below n = {n}, got {tokens[-1]}")
    hi = 0 if causal else None
    marked = progressions(np.array(tokens, np.int64))
    edges = [-1, *tokens, n]
    others = [gap for a, b in pairwise(edges) if (gap := Run(a + 1, b))]
    # Whole rows, then the columns in between: disjoint as they are.
    parts = [Slice.make(run, Run(0, n), None, hi) for run in marked]
    parts += [Slice.make(gap, run, None, hi) for gap in others for run in marked]
    return Mask(tuple(part for part in parts if part), n, n)


def block_local(n: int, block: int, causal: bool = True) -> Mask:
    """Blocks of ``block`` tokens, each of which sees itself only."""
    return shifted_block(n, block, 0, causal)


def shifted_block(n: int, block: int, shift: int | None = None, causal: bool = True) -> Mask:
    """Like block_local, all boundaries moved by ``shift`` (default: half a block), so that layers
    which alternate between the two let neighbours meet (Liu et al. 2021, "Swin Transformer")."""
    n, block = integer("n", n, 0), integer("block", block, 1)
    shift = block // 2 if shift is None else integer("shift", shift, 0) % block
    ends = [0, *range(shift or block, n, block), n]
    return documents([b - a for a, b in pairwise(ends)], causal)


def block_causal(n: int, block: int) -> Mask:
    """Each token sees its own block of ``block`` tokens whole, and all blocks before it."""
    n, block = integer("n", n, 0), integer("block", block, 1)
    starts = range(0, n, block)
    parts = (Slice.make(Run(at, min(at + block, n)), Run(0, min(at + block, n))) for at in starts)
    return Mask(tuple(parts), n, n)


def dilated(n: int, window: int, dilation: int, causal: bool = True) -> Mask:
    """Every ``dilation``-th of the keys up to ``(window - 1) * dilation`` away, the token itself
    included: a window with gaps (Beltagy et al. 2020, "Longformer"); ``dilation`` slices."""
    n, window, dilation = (
        integer("n", n, 0),
        integer("window", window, 1),
        integer("dilation", dilation, 1),
    )
    far = (window - 1) * dilation
    classes = [Run(start, n, dilation) for start in range(min(n, dilation))]
    return Mask(tuple(Slice.make(r, r, -far, 0 if causal else far) for r in classes), n, n)


def strided(n: int, stride: int, causal: bool = True) -> Mask:
    """The last ``stride`` keys, and every ``stride``-th before them: ``q - k < stride`` or
    ``(q - k) % stride == 0`` (Child et al. 2019, "Sparse Transformers")."""
    local = sliding_window(n, stride, causal)
    return local | dilated(n, max(1, -(-n // stride)), stride, causal)


def log_sparse(n: int, local: int = 1, causal: bool = True) -> Mask:
    """The last ``local`` keys, and those 1, 2, 4, 8, ... tokens back (Li et al. 2019, "LogSparse");
    not causal: on both sides."""
    n, local = integer("n", n, 0), integer("local", local, 1)
    back = [2**i for i in range(max(0, n - 1).bit_length()) if 2**i >= local]
    bands = [(1 - local, 0 if causal else local - 1), *((-x, -x) for x in back)]
    bands += [] if causal else [(x, x) for x in back]
    whole = Run(0, n)
    parts = (Slice.make(whole, whole, lo, hi) for lo, hi in bands)
    return Mask(tuple(part for part in parts if part), n, n)


def chosen_blocks(n: int, block: int, chosen: Sequence[Sequence[int]], causal: bool = True) -> Mask:
    """In blocks of ``block`` tokens: of each block of queries the ``chosen`` blocks of keys, one
    list for each block in order (block-sparse attention; Qiu et al. 2019, "BlockBERT"). Causal: no
    key after its query."""
    n, block = integer("n", n, 0), integer("block", block, 1)
    blocks = -(-n // block)
    if len(chosen) != blocks:
        raise ValueError(f"chosen must list blocks for each of {blocks}, got {len(chosen)} lists")
    parts = []
    for row, some in enumerate(chosen):
        own = {integer("every chosen block", x, 0) for x in _listed(some)}
        if own and max(own) >= blocks:
            raise ValueError(f"every chosen block must be below {blocks}, got {max(own)}")
        q = Run(row * block, min(n, (row + 1) * block))
        keys = union([Run(x * block, min(n, (x + 1) * block)) for x in own])
        parts += [Slice.make(q, k, None, 0 if causal else None) for k in keys]
    return Mask(tuple(part for part in parts if part), n, n)


def big_bird(
    n: int,
    block: int = 64,
    window: int = 3,
    random: int = 3,
    global_blocks: int = 2,
    seed: int = 0,
    causal: bool = False,
) -> Mask:
    """In blocks of ``block`` tokens: the ``window`` nearest blocks (an odd number, the own one in
    the middle), ``random`` blocks drawn for each block of queries, and the first ``global_blocks``,
    which see and are seen by all (Zaheer et al. 2020, "Big Bird"). One ``seed``, one mask."""
    n, block, window = integer("n", n, 0), integer("block", block, 1), integer("window", window, 1)
    random = integer("random", random, 0)
    global_blocks, seed = integer("global_blocks", global_blocks, 0), integer("seed", seed, 0)
    if window % 2 == 0:
        raise ValueError(f"window must be an odd number of blocks, got {window}")
    blocks, generator = -(-n // block), np.random.default_rng(seed)
    edge = min(n, global_blocks * block)
    hi = 0 if causal else None
    parts = [Slice.make(Run(0, edge), Run(0, n), None, hi)]
    for row in range(global_blocks, blocks):
        seen = set(range(global_blocks))
        seen |= set(range(max(0, row - window // 2), min(blocks, row + window // 2 + 1)))
        others = np.setdiff1d(np.arange(row if causal else blocks), list(seen), assume_unique=True)
        seen |= set(generator.choice(others, min(random, len(others)), replace=False).tolist())
        q = Run(row * block, min(n, (row + 1) * block))
        keys = union([Run(x * block, min(n, (x + 1) * block)) for x in seen])
        parts += [Slice.make(q, k, None, hi) for k in keys]
    return Mask(tuple(part for part in parts if part), n, n)


def from_slices(
    slices: Iterable[Slice | tuple[Any, ...]], n_q: int, n_k: int | None = None
) -> Mask:
    """A mask of ``n_q`` queries and ``n_k`` keys (by default as many) from any slices; overlaps are
    counted once.

    A slice may also be written ``(queries, keys, lo, hi)`` with ``(start, stop)`` or
    ``(start, stop, step)`` for a run, and None where the band is open. Raises ValueError for
    anything else, for runs that end before they begin and bands whose ``lo`` is above ``hi`` where
    they are written so, and outside of the range.
    """
    n_q = integer("n_q", n_q, 0)
    n_k = n_q if n_k is None else integer("n_k", n_k, 0)
    parts = [part for item in slices if (part := _parsed(item))]
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


BUILDERS = {
    build.__name__: build
    for build in (
        full, causal, sliding_window, documents, from_cu_seqlens,
        from_document_ids, prefix_lm, shared_question, sinks, global_tokens, block_local,
        shifted_block, block_causal, dilated, strided, log_sparse, chosen_blocks, big_bird,
        from_slices,
    )
}  # fmt: skip
