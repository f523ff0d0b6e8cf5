"""Short causal convolutions over split sequences: the few tokens before a segment, its halo, come
from the ranks that own them. ``segments``: of :func:`ringattn.make_segments`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ringattn.execution.carriers import Comm, connect
from ringattn.execution.exchange import take
from ringattn.execution.wanted import check_wanted
from ringattn.mixers.chunks import in_float32, nothing
from ringattn.planning.segments import Halo, Segments


@in_float32
def conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    segments: Segments,
    group: Any = None,
) -> torch.Tensor:
    """``out_t = bias + sum over j of weight[:, j] x_{t - width + 1 + j}``, over the tokens of a
    document: a causal convolution, each channel by itself; of width 2 with weights (1, 0) a token
    shift.

    x ``[batch, tokens, channels]`` of this rank, weight ``[channels, width]``, bias ``[channels]``.
    Returns what x is like. Collective over ``group`` (None: the default one). Raises ValueError
    for shapes that do not fit.
    """
    comm = connect(group)
    check_wanted(comm, x, weight, bias)
    if segments.world != comm.world:
        raise ValueError(f"segments of {segments.world} ranks in a group of {comm.world}")
    tokens = segments.layout.count(comm.rank)
    if x.dim() != 3 or x.shape[1] != tokens or weight.shape[:1] != x.shape[2:]:
        raise ValueError(
            f"conv: x must be [batch, {tokens}, channels] and weight [channels, width], got "
            f"{list(x.shape)} and {list(weight.shape)}"
        )
    if not tokens:
        return nothing(x, weight, bias)
    width = weight.shape[1]
    halo, rows, keep = _rows(segments, comm.rank, width, x.device)
    x_all = torch.cat([x, _Halo.apply(x, halo, comm)], 1) if halo.sends or halo.recvs else x
    x_all = torch.cat([x_all, x_all.new_zeros(x.shape[0], 1, x.shape[2])], 1)
    laid = F.pad(x_all[:, rows].mT, (width - 1, 0))
    bias = None if bias is None else bias.to(x.dtype)
    out = F.conv1d(laid, weight[:, None].to(x.dtype), bias, groups=x.shape[2])
    return out.mT[:, keep].to(x.dtype)


@lru_cache(maxsize=8)
def _rows(
    segments: Segments, rank: int, width: int, device: torch.device
) -> tuple[Halo, torch.Tensor, torch.Tensor]:
    """(the halo, the rows of every piece after those before it, which of these are the pieces').
    Rows are this rank's, then received ones, then one of zeros."""
    before = width - 1
    halo = segments.halo(rank, before)
    none = segments.layout.count(rank) + sum(halo.recvs.values())
    rows: list[Any] = []
    keep: list[Any] = []
    at = 0
    for piece, known in zip(segments.pieces(rank), halo.before, strict=True):
        rows += [[none] * (before - len(known)) + known, np.arange(piece.start, piece.stop)]
        keep.append(np.arange(at + before, at + before + len(piece)))
        at += before + len(piece)
    laid, kept = (
        torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device)
        for parts in (rows, keep)
    )
    return halo, laid, kept


class _Halo(torch.autograd.Function):
    """The rows that come from other ranks, in the order of the peers."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, halo: Halo, comm: Comm) -> torch.Tensor:
        ctx.halo, ctx.comm, ctx.shape = halo, comm, x.shape
        got = x.new_empty(x.shape[0], sum(halo.recvs.values()), x.shape[2])
        parts = [x.new_empty(x.shape[0], n, x.shape[2]) for n in halo.recvs.values()]
        comm.start(
            [(take(x, rows).contiguous(), peer) for peer, rows in halo.sends.items()],
            list(zip(parts, halo.recvs, strict=True)),
            "halos",
        ).wait()
        return torch.cat(parts, 1) if parts else got

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        halo, comm, shape = ctx.halo, ctx.comm, ctx.shape
        parts = grad.split(list(halo.recvs.values()), 1) if halo.recvs else ()
        counts = {peer: sum(map(len, rows)) for peer, rows in halo.sends.items()}
        back = {peer: grad.new_empty(shape[0], n, shape[2]) for peer, n in counts.items()}
        comm.start(
            [(part.contiguous(), peer) for part, peer in zip(parts, halo.recvs, strict=True)],
            [(buffer, peer) for peer, buffer in back.items()],
            "gradients of halos",
        ).wait()
        d_x = grad.new_zeros(shape)
        for peer, rows in halo.sends.items():
            # One after the other: a row may be in the halos of several segments.
            for run, part in zip(rows, back[peer].split(list(map(len, rows)), 1), strict=True):
                d_x[:, run.start : run.stop] += part
        return d_x, None, None
