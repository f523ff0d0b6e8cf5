"""Plans of what is only known at run time: which queries have chosen which blocks.

Batches and heads that choose for themselves are *copies* of the sequence, laid end to end: the keys
of copy c are positions c n to (c + 1) n, and the queries are the rows that have chosen a block,
each as often as it has, by copy and block. So a choice is a mask of full rectangles, and its plan
is a plan like others: rows that nobody chose do not travel.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from ringattn.planning.blocks import Blocks
from ringattn.planning.layouts import Layout
from ringattn.planning.masks import Mask
from ringattn.planning.plan import Plan
from ringattn.planning.runs import Run
from ringattn.planning.slices import Slice


def copies_of(layout: Layout, copies: int) -> Layout:
    """The layout of so many copies of the tokens, laid end to end."""
    n = layout.n
    runs = (
        tuple(Run(c * n + run.start, c * n + run.stop) for c in range(copies) for run in own)
        for own in layout.runs
    )
    return Layout(n * copies, tuple(runs), layout.name)


def plan_of_choice(blocks: Blocks, counts: np.ndarray) -> Plan:
    """``counts`` int ``[world, copies, blocks]``: how many rows of each rank have chosen a block;
    a rank's rows are in that order."""
    world, copies, _ = counts.shape
    n = blocks.layout.n
    rank, copy, block = np.nonzero(counts)
    ends = np.cumsum(counts[rank, copy, block])
    each = (
        ends - counts[rank, copy, block],
        ends,
        blocks.starts[block] + copy * n,
        blocks.stops[block] + copy * n,
    )
    parts = tuple(
        Slice(Run(a, b), Run(c, d), c - b + 1, d - 1 - a)
        for a, b, c, d in zip(*(x.tolist() for x in each), strict=True)
    )
    cuts = [0, *np.cumsum(counts.reshape(world, -1).sum(1)).tolist()]
    rows = Layout(
        cuts[-1],
        tuple((Run(a, b),) if b > a else () for a, b in pairwise(cuts)),
        "rows that chose",
    )
    keys = blocks.remember(("copies", copies), lambda: copies_of(blocks.layout, copies))
    return Plan(Mask(parts, cuts[-1], n * copies), rows, keys, "direct", 1, world)


_SLICES = 2**15  # of a stand-in, about


def expected(blocks: Blocks, picks: int) -> Mask:
    """A stand-in, for forecasts, of a choice that is not known yet: every token with ``picks`` of
    the earlier blocks of its document, spread evenly: about as many pairs as a choice has, and rows
    from everywhere. Blocks that follow each
    other share what they see, as many as keep the mask short."""
    together = max(1, len(blocks) * min(picks, len(blocks)) // _SLICES)
    parts = []
    for first, last in zip(blocks.firsts.tolist(), blocks.lasts.tolist(), strict=True):
        for own in range(first, last, together):
            q = Run(int(blocks.starts[own]), int(blocks.stops[min(own + together, last) - 1]))
            count = own - first
            if count <= picks:
                runs = [(first, own)] if count else []
            else:
                chosen = [first + (2 * i + 1) * count // (2 * picks) for i in range(picks)]
                runs = [(block, block + 1) for block in chosen]
            parts += [
                Slice.make(q, Run(int(blocks.starts[a]), int(blocks.stops[b - 1]))) for a, b in runs
            ]
    n = blocks.layout.n
    return Mask(tuple(part for part in parts if part), n, n)
