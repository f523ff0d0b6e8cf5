"""Softmax attention over near tokens and over summaries of those further away.

``kernel`` and ``scale`` are those of :func:`ringattn.ring_attention`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from ringattn.execution.carriers import Comm, connect
from ringattn.mixers.chunks import in_float32
from ringattn.mixers.heads import split_heads
from ringattn.mixers.pooling import How, pool
from ringattn.mixers.union import Part, union
from ringattn.planning.blocks import Blocks


@in_float32
def pooled(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    blocks: Blocks | Sequence[Blocks],
    group: Any = None,
    near: int = 1,
    how: How = "mean",
    weights: torch.Tensor | None = None,
    causal: bool = True,
    kernel: str = "auto",
    scale: float | None = None,
) -> torch.Tensor:
    """Every token attends its own block of ``blocks`` and ``near - 1`` before it, causally, and
    summaries of all earlier blocks of its document, under one softmax in which a summary counts as
    often as its block has tokens. With several ``blocks``, from fine to coarse (each size a
    multiple of the one before), what is far away is summarised coarsely: H-Transformer-1D's pattern
    (Zhu and Soricut 2021, arXiv:2107.11906), Combiner's (Ren et al. 2021, arXiv:2107.05768).

    Not ``causal``: near blocks on both sides, and summaries of all blocks of the document, each
    counted once: transient global tokens (Guo et al. 2022, "LongT5", arXiv:2112.07916).

    q ``[batch, local tokens, heads, head_dim]``, k and v with kv_heads; ``how`` and ``weights``
    (``[batch, local tokens, kv_heads, 1]``) as in :func:`ringattn.mixers.pool`, of keys and values
    alike. A summary is seen when its block has ended and not before. Returns what q is like.
    Collective over ``group``. Raises ValueError for blocks that do not fit each other.
    """
    levels = [blocks] if isinstance(blocks, Blocks) else list(blocks)
    _check(levels, near, causal)
    others = () if weights is None else (weights,)

    def mixer(
        first: Blocks, comm: Comm, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        inside = [first, *(level.of_groups if level.ulysses > 1 else level for level in levels[1:])]
        parts = [Part(k, v, first.plan(first.near(near, causal)))]
        for level, coarser in zip(inside, [*inside[1:], None], strict=True):
            means = pool(torch.cat([k, v], -1), level, comm, how, weights).to(q.dtype)
            mask = level.past(near, coarser) if causal else level.whole()
            plan = level.plan(mask, level.summaries())
            weight = math.log(level.size) if causal else 0.0
            keys, values = means.split([k.shape[3], v.shape[3]], 3)
            parts.append(Part(keys, values, plan, weight))
        return union(q, parts, comm, kernel, scale)

    return split_heads(mixer, levels[0], connect(group), q, k, v, *others)


def _check(levels: Sequence[Blocks], near: int, causal: bool) -> None:
    if near < 1:
        raise ValueError(f"pooled: near must be at least 1, the own block, got {near}")
    if len(levels) > 1 and not causal:
        raise ValueError("pooled: several levels are causal only")
    for fine, coarse in pairwise(levels):
        if coarse.size % fine.size or coarse.size == fine.size:
            raise ValueError(
                f"pooled: blocks of {coarse.size} tokens are not made of blocks of {fine.size}"
            )
        if (coarse.layout, coarse.lengths, coarse.ulysses) != (
            fine.layout, fine.lengths, fine.ulysses
        ):  # fmt: skip
            raise ValueError("pooled: all levels need one layout, documents and ulysses")
