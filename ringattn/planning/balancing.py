"""Samples of unequal work, dealt to data ranks and micro-steps.

The ranks of a micro-step wait for the slowest of them, so the time of an optimizer step is the sum,
over its micro-steps, of the largest work of a rank (Wang et al. 2025, "WLB-LLM", arXiv 2503.17924,
whose idea it is to pack by the work of attention instead of by tokens). Samples of like work
therefore belong into one micro-step. Which samples an optimizer step has is not changed, so neither
are its loss and gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

import numpy as np


def deal(
    work: Sequence[float], ranks: int, micro_steps: int, size: int = 1
) -> list[list[list[int]]]:
    """Sample numbers by micro-step and rank: ``deal(...)[micro][rank]`` are ``size`` of them.

    ``work``: of each of the ``ranks * micro_steps * size`` samples. Largest first, each goes to the
    batch with the least work so far that has room (Graham 1969); then batches of like work become
    micro-steps.

    >>> deal([4, 1, 4, 1], ranks=2, micro_steps=2)
    [[[0], [2]], [[1], [3]]]

    Raises ValueError for another number of samples.
    """
    work = np.asarray(work, np.float64)
    batches = ranks * micro_steps
    if len(work) != batches * size:
        raise ValueError(
            f"{len(work)} samples for {micro_steps} micro-steps of {ranks} ranks of {size}"
        )
    if not len(work) or work.min() == work.max():  # in their own order
        each = np.arange(len(work)).reshape(batches, size).tolist()
        return [each[at : at + ranks] for at in range(0, batches, ranks)]
    members: list[list[int]] = [[] for _ in range(batches)]
    total, least = np.zeros(batches), [(0.0, batch) for batch in range(batches)]  # a heap
    for sample in np.argsort(-work, kind="stable").tolist():
        so_far, batch = heappop(least)
        members[batch].append(sample)
        total[batch] = so_far + work[sample]
        if len(members[batch]) < size:
            heappush(least, (float(total[batch]), batch))
    order = np.argsort(-total, kind="stable").tolist()
    each = [sorted(members[batch]) for batch in order]
    return [each[at : at + ranks] for at in range(0, batches, ranks)]


def imbalance(work: np.ndarray) -> float:
    """How much longer the ranks of a step wait than they would work if all had the same: the
    largest work of a rank over the mean, both summed over micro-steps. ``work``:
    ``[micro_steps, ranks]``; 1.0 is perfect."""
    work = np.asarray(work, np.float64)
    mean = work.mean(1).sum()
    return float(work.max(1).sum() / mean) if mean else 1.0
