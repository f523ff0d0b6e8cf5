"""Mamba-1's selective scan over split sequences: a decay for each channel and dimension of its
state. ``segments``: of :func:`ringattn.make_segments`; ``chunk``: tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch

from ringattn.execution.carriers import Comm, connect
from ringattn.execution.wanted import check_wanted
from ringattn.mixers.chunks import chunks_of, follow, in_float32, nothing
from ringattn.mixers.moving import moved
from ringattn.mixers.recurrent import CHUNK, FirstOfPieces
from ringattn.planning.segments import Segments
from ringattn.planning.state_exchange import StateBytes, StateExchange, exchange_of


@in_float32
def scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    segments: Segments,
    group: Any = None,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t``, ``out_t = h_t C_t`` (Gu and Dao 2023,
    arXiv:2312.00752), for each channel by itself.

    x, dt ``[batch, tokens, channels]`` of this rank, A ``[channels, state]`` (at most 0; its
    gradient is this rank's share), B, C ``[batch, tokens, state]``. Returns what x is like; states
    are float32. Without the skip ``D x`` and gates, which are the caller's.

    Collective over ``group`` (None: the default one). Raises ValueError for shapes that do not fit.
    """
    comm = connect(group)
    check_wanted(comm, x, dt, A, B, C)
    tokens = segments.layout.count(comm.rank)
    if segments.world != comm.world:
        raise ValueError(f"segments of {segments.world} ranks in a group of {comm.world}")
    fits = x.shape == dt.shape and B.shape == C.shape == (*x.shape[:2], A.shape[-1])
    if x.dim() != 3 or x.shape[1] != tokens or not fits or len(A) != x.shape[2]:
        raise ValueError(
            f"scan: x and dt must be [batch, {tokens}, channels], A [channels, state], B and C "
            f"[batch, {tokens}, state], got {[list(t.shape) for t in (x, dt, A, B, C)]}"
        )
    each = len(x) * x.shape[2]
    sizes = StateBytes(
        state=4 * each * A.shape[1],
        transition=4 * each * A.shape[1],
        given=each * (x.element_size() + dt.element_size())
        + len(x) * A.shape[1] * (B.element_size() + C.element_size()),
        returned=each * x.element_size(),
    )
    exchange = exchange_of(segments, sizes)
    if exchange.move is None:
        return _in_chunks(x, dt, A, B, C, exchange, comm, chunk)
    x, dt, B, C = moved([x, dt, B, C], exchange.move, comm)
    out = _in_chunks(x, dt, A, B, C, exchange, comm, chunk)
    return moved([out], exchange.move.back, comm)[0]


def _in_chunks(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    exchange: StateExchange,
    comm: Comm,
    chunk: int,
) -> torch.Tensor:
    """In the layout of the exchange."""
    if not x.shape[1]:
        return nothing(x, dt, A, B, C)
    chunks = chunks_of(exchange.segments, comm.rank, chunk, x.device)
    dt, given = chunks.cut(dt[:, :, None]), chunks.cut((dt.float() * x.float())[:, :, None])
    B, C = chunks.cut(B[:, :, None]), chunks.cut(C[:, :, None])
    # [chunks, batch, channels, size, state]
    log = (dt.mT[:, :, 0, :, :, None] * A[:, None].float()).double()
    total = log.cumsum(-2)
    factors = log.float().exp()
    inputs = given.mT[:, :, 0, :, :, None] * B
    state, states = torch.zeros_like(inputs[..., 0, :]), []
    for factor, new in zip(factors.unbind(-2), inputs.unbind(-2), strict=True):
        state = factor * state + new
        states.append(state)
    inside = torch.stack(states, -2)
    transition, addend = total[..., -1, :].float().exp()[..., None], state[..., None]
    firsts = FirstOfPieces(transition, addend, total[..., -1, :], chunks, exchange, comm, None)
    grown = total.float().exp()  # this and what states within chunks give, while summaries travel
    out = torch.einsum("nbdcs,nbhcs->nbdc", inside, C)
    before, _ = follow(transition, addend, firsts.wait(), chunks.lines)
    out = out + torch.einsum("nbdcs,nbhcs->nbdc", grown * before.mT, C)
    return chunks.joined(out.unsqueeze(-1)).squeeze(-1).to(x.dtype)
