"""A learned span of attention for each head.

``kernel`` and ``scale`` are those of :func:`ringattn.ring_attention`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from ringattn.execution.carriers import connect
from ringattn.kernels import state_dtype
from ringattn.mixers.chunks import in_float32
from ringattn.mixers.union import Part, State, combine, union
from ringattn.planning.blocks import Blocks
from ringattn.planning.plan import Plan


@in_float32
def adaptive_span(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spans: torch.Tensor,
    *,
    blocks: Blocks,
    ramp: int = 32,
    group: Any = None,
    kernel: str = "auto",
    scale: float | None = None,
) -> torch.Tensor:
    """Causal attention in which a key x tokens back counts ``clamp((ramp + span - x) / ramp, 0,
    1)`` times, with a learned span for each head (Sukhbaatar et al. 2019, arXiv:1905.07799).

    spans ``[heads]``, at least 0, in tokens, alike on all ranks; their gradient is this rank's
    share. Heads with the same whole part of the span go together, each such group with a window and
    ``ramp`` diagonals of its own, under one softmax: so many exchanges, and a tile of keys for each
    diagonal; keep ``ramp`` short, and spans together. q
    ``[batch, local tokens, heads, head_dim]``, k and v with kv_heads. Of ``blocks`` only the
    documents matter; its ulysses must be 1. Returns what q is like. Collective over ``group``.
    """
    if spans.shape != q.shape[2:3] or ramp < 1 or blocks.ulysses > 1:
        raise ValueError(
            f"adaptive_span: spans must be [{q.shape[2]}], ramp at least 1 and ulysses 1; got "
            f"{list(spans.shape)}, {ramp} and {blocks.ulysses}"
        )
    comm = connect(group)
    wide = q.shape[2] // k.shape[2]
    known = spans.detach().to(state_dtype(spans.dtype)).clamp(0, blocks.layout.n)
    beyond = known - known.floor()
    whole = known.long().tolist()
    columns: list[tuple[list[int], torch.Tensor]] = []
    for span in sorted(set(whole)):
        heads = [head for head, own in enumerate(whole) if own == span]
        kv = [head // wide for head in heads]
        q_own, k_own, v_own = q[:, :, heads], k[:, :, kv], v[:, :, kv]
        options: Any = (comm, kernel, scale)
        parts = [Part(k_own, v_own, _plan(blocks, 0, span))]
        for step in range(1, ramp + 1):
            share = (ramp - step + beyond[heads]) / ramp
            weight = share.clamp_min(1e-30).log()
            parts.append(Part(k_own, v_own, _plan(blocks, span + step, span + step), weight))
        with torch.no_grad():
            on_ramp = Part(k_own, v_own, _plan(blocks, span + 1, span + ramp))
            probe, lse = union(q_own, [on_ramp], *options, return_lse=True)
        # Worth nothing, with the gradient that a longer span has: every key of the ramp alike.
        more = (spans[heads] - spans[heads].detach()) / ramp
        columns.append((heads, combine(q_own, parts, [State(probe, lse, more)], *options)))
    order = [head for heads, _ in columns for head in heads]
    out = torch.cat([part for _, part in columns], 2)
    return out[:, :, [order.index(head) for head in range(len(order))]]


@lru_cache(maxsize=256)
def _plan(blocks: Blocks, nearest: int, furthest: int) -> Plan:
    """Keys from so many to so many tokens back. Not kept with the blocks: spans change."""
    return blocks.new_plan(blocks.back(nearest, furthest))
