"""Linear attention and the delta rule over split sequences, in chunks, with torch on any device.

Within a chunk everything is a matrix product; from chunk to chunk goes a state in float32, and from
segment to segment a summary: see ``chunks`` and ``states``. ``segments``: of
:func:`ringattn.make_segments`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch

from ringattn.execution.carriers import Comm, connect
from ringattn.execution.wanted import check_wanted
from ringattn.mixers import fla
from ringattn.mixers.chunks import Chunks, chunks_of, follow, nothing
from ringattn.mixers.inputs import Inputs
from ringattn.mixers.moving import moved
from ringattn.mixers.states import FirstStates
from ringattn.planning.segments import Segments
from ringattn.planning.state_exchange import StateExchange, exchange_of

CHUNK, CHUNK_OF_VECTORS = 64, 16  # tokens; with a decay for each of dk all pairs of them exist


@overload
def linear(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor | None = None, *,
    segments: Segments, group: Any = None, scale: float | None = None, normalize: bool = False,
    initial: torch.Tensor | None = None, chunk: int | None = None,
    return_lse: Literal[False] = False,
) -> torch.Tensor: ...  # fmt: skip


@overload
def linear(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor | None = None, *,
    segments: Segments, group: Any = None, scale: float | None = None, normalize: bool = False,
    initial: torch.Tensor | None = None, chunk: int | None = None, return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


@overload
def linear(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor | None = None, *,
    segments: Segments, group: Any = None, scale: float | None = None, normalize: bool = False,
    initial: torch.Tensor | None = None, chunk: int | None = None, return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


def linear(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor | None = None,
    *,
    segments: Segments,
    group: Any = None,
    scale: float | None = None,
    normalize: bool = False,
    initial: torch.Tensor | None = None,
    chunk: int | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``S_t = D_t S_{t-1} + k_t v_t^T``, ``out_t = scale S_t^T q_t``; ``D_t = diag exp decay_t``.

    Without decay linear attention (Katharopoulos et al. 2020; with feature maps on q and k
    Performer and Random Feature Attention, see ``features``); with one for each head RetNet and
    lightning attention, for each head and token Mamba-2 (SSD), for each of dk too GLA.

    q, k ``[batch, tokens, heads, dk]`` of this rank, v ``[batch, tokens, heads, dv]``; decay, the
    logarithm and at most 0: ``[heads]``, ``[batch, tokens, heads]`` or ``[batch, tokens, heads,
    dk]``. ``scale`` None: ``1 / sqrt(dk)``. ``normalize``: divided by ``scale z_t^T q_t``, z being
    the state of v = 1. ``initial`` ``[heads, dk, dv]``: the state that every document begins with;
    its gradient, and that of a decay ``[heads]``, is this rank's share. ``chunk``: tokens of a
    chunk in torch, and no kernels (see ``fla``). ``return_lse``: with ``normalize``, also the
    logarithm of what is divided by, ``[batch, heads, tokens]``, which ``combine`` takes. Returns
    ``[batch, tokens, heads, dv]`` in the dtype of v; states are float32.

    Collective over ``group`` (None: the default one). Raises ValueError for shapes that do not fit.
    """
    if not normalize:
        if return_lse:
            raise ValueError("linear: return_lse needs normalize")
        given = Inputs(q, k, v, decay, None, _scale(scale, q), initial)
        return _mix(given, segments, group, chunk)
    if initial is not None:
        raise ValueError("linear: initial and normalize do not go together")
    both = torch.cat([v.float(), v.new_ones(*v.shape[:3], 1, dtype=torch.float32)], -1)
    out = _mix(Inputs(q, k, both, decay, None, _scale(scale, q), None), segments, group, chunk)
    mixed = (out[..., :-1] / out[..., -1:]).to(v.dtype)
    return (mixed, out[..., -1].log().mT) if return_lse else mixed


def delta(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    decay: torch.Tensor | None = None,
    *,
    segments: Segments,
    group: Any = None,
    scale: float | None = None,
    initial: torch.Tensor | None = None,
    chunk: int | None = None,
) -> torch.Tensor:
    """``S_t = D_t S_{t-1} + beta_t k_t (v_t - (D_t S_{t-1})^T k_t)^T``, ``out_t = scale S_t^T
    q_t``: the delta rule (Yang et al. 2024, arXiv:2406.06484), with a decay for each head gated
    (arXiv:2412.06464), for each of dk too Kimi's (arXiv:2510.26692). Keys should have a norm of 1.

    beta ``[batch, tokens, heads]``; all else, the errors too, as in :func:`linear`.
    """
    if beta.shape != k.shape[:3]:
        raise ValueError(f"delta: beta must be {list(k.shape[:3])}, got {list(beta.shape)}")
    given = Inputs(q, k, v, decay, beta, _scale(scale, q), initial)
    return _mix(given, segments, group, chunk)


def _scale(scale: float | None, q: torch.Tensor) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _mix(given: Inputs, segments: Segments, group: Any, chunk: int | None) -> torch.Tensor:
    comm = connect(group)
    check_wanted(comm, given.q, given.k, given.v, given.decay, given.beta, given.initial)
    given.check(segments, comm)
    exchange = exchange_of(segments, given.bytes)
    with torch.autocast(given.q.device.type, enabled=False):  # it would take states to half
        if exchange.move is None:
            return _in_its_layout(given.spread(), exchange, comm, chunk)
        given = given.moved(exchange.move, comm).spread()
        out = _in_its_layout(given, exchange, comm, chunk)
        return moved([out], exchange.move.back, comm)[0]


def _in_its_layout(
    given: Inputs, exchange: StateExchange, comm: Comm, chunk: int | None
) -> torch.Tensor:
    """In that of the exchange: by kernels, or in chunks."""
    q, k, v, decay, beta = given.q, given.k, given.v, given.decay, given.beta
    if not q.shape[1]:
        return nothing(v, q, k, decay, beta, given.initial)
    if chunk is None and fla.runs(v, k.shape[-1]):
        sizes = (*k.shape[2:], v.shape[3])
        fla.prove(beta is not None, given.vectors, *sizes, v.dtype, v.device)
        return fla.mix(given, exchange, comm)
    size = chunk or (CHUNK_OF_VECTORS if given.vectors else CHUNK)
    chunks = chunks_of(exchange.segments, comm.rank, size, q.device)
    q, k, v32 = (
        chunks.cut(q) * given.scale,
        chunks.cut(k),
        chunks.cut(v),
    )  # [chunks, batch, heads, C, d]
    log = _decays(chunks, decay, k)
    # The sum of decays up to each token; in float64, since differences of it count.
    total = log.double().cumsum(-2)
    grown = total.float().exp()
    ahead = (total[..., -1:, :] - total).float().exp() * k  # from each token to the chunk's end
    values, reads = v32, None
    if beta is not None:
        strength = chunks.cut(beta)[..., None]
        system = (strength * _pairs(k, k, total)).tril(-1)
        both = torch.cat([strength * v32, strength * grown * k], -1)
        solved = torch.linalg.solve_triangular(system, both, upper=False, unitriangular=True)
        values, reads = solved.split([v32.shape[-1], k.shape[-1]], -1)
    addend = ahead.mT @ values
    transition = grown[..., -1, :, None]  # [chunks, batch, heads, dk or 1, 1]
    if reads is not None:
        diagonal = transition[..., 0].expand(*k.shape[:3], k.shape[-1])
        transition = torch.diag_embed(diagonal) - ahead.mT @ reads
    log = total[..., -1, :]
    firsts = FirstOfPieces(transition, addend, log, chunks, exchange, comm, given.initial)
    # While summaries travel: within chunks, and what the state before a chunk will be read by.
    scores, reach = _pairs(q, k, total).tril(), q * grown
    inside = scores @ values
    if reads is not None:
        reach = reach - scores @ reads
    states, _ = follow(transition, addend, firsts.wait(), chunks.lines)
    return chunks.joined(inside + reach @ states).to(v.dtype)


def _decays(chunks: Chunks, decay: torch.Tensor | None, k: torch.Tensor) -> torch.Tensor:
    """``[chunks, batch, heads, C, dk or 1]``."""
    if decay is None:
        return k.new_zeros(*k.shape[:-1], 1)
    log = chunks.cut(decay)
    return log if decay.dim() == 4 else log[..., None]


def _pairs(q: torch.Tensor, k: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """``sum over d of q_td k_sd exp(total_td - total_sd)`` for s <= t, else what is to be cut off;
    no factor is above 1, so none overflows."""
    C = q.shape[-2]
    later = torch.ones(C, C, dtype=torch.bool, device=q.device).triu(1)
    if total.shape[-1] == 1:
        apart = total - total.mT
        return (q @ k.mT) * apart.masked_fill(later, -torch.inf).float().exp()
    apart = total.unsqueeze(-2) - total.unsqueeze(-3)  # [..., t, s, dk]
    factors = apart.masked_fill(later[..., None], -torch.inf).float().exp()
    return torch.einsum("...td,...sd,...tsd->...ts", q, k, factors)


class FirstOfPieces:
    """The state that each piece begins with: of the segments before it, or that of a document. The
    exchange begins here and ends in :meth:`wait`. ``log``: of the transitions that are diagonal."""

    def __init__(
        self,
        transition: torch.Tensor,
        addend: torch.Tensor,
        log: torch.Tensor,
        chunks: Chunks,
        exchange: StateExchange,
        comm: Comm,
        initial: torch.Tensor | None,
    ) -> None:
        zero = torch.zeros_like(addend[0])
        self._pieces, segments = chunks.pieces, exchange.segments
        self._begin = begin = zero if initial is None else zero + initial.float()
        self._firsts, self._own = None, segments.of(comm.rank)
        if not exchange.forward.steps:
            return
        through = {segment.number: torch.zeros_like(transition[0]) for segment in self._own}
        added = {segment.number: zero for segment in self._own}
        ends = [
            (piece, line)
            for piece, line in zip(chunks.pieces, chunks.lines, strict=True)
            if piece.last and segments.read(piece.segment)
        ]
        if ends:
            starts = torch.stack([zero if piece.carries else begin for piece, _ in ends])
            summaries = _summaries(transition, addend, log, starts, [line for _, line in ends])
            for (piece, _), way, state in zip(ends, *summaries, strict=True):
                added[piece.segment.number] = state
                if piece.segment.passes:
                    through[piece.segment.number] = way
        self._firsts = FirstStates(
            torch.stack([through[segment.number] for segment in self._own]),
            torch.stack([added[segment.number] for segment in self._own]),
            addend if initial is None else addend + 0.0 * begin,
            exchange,
            comm,
        )

    def wait(self) -> torch.Tensor:
        """``[pieces, batch, heads, dk, dv]``."""
        if self._firsts is None:
            return torch.stack([self._begin] * len(self._pieces))
        # 0 where a document begins with the segment; used all the same, so that every rank takes
        # part in the exchange of the backward.
        first = self._firsts.wait()
        given = {segment.number: state for segment, state in zip(self._own, first, strict=True)}
        begins = {segment.offset for segment in self._own}
        return torch.stack(
            [
                given[piece.segment.number] + (0.0 if piece.carries else 1.0) * self._begin
                if piece.start in begins
                else self._begin
                for piece in self._pieces
            ]
        )


def _summaries(
    transition: torch.Tensor,
    addend: torch.Tensor,
    log: torch.Tensor,
    starts: torch.Tensor,
    lines: Sequence[tuple[int, int]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """(transition, addend) of each line of chunks. A transition comes from the same steps with the
    identity as first state and nothing added."""
    if transition.shape[-1] == 1:
        ways = [log[a:b].sum(0).float().exp()[..., None] for a, b in lines]
        return torch.stack(ways), follow(transition, addend, starts, lines)[1]
    dk = transition.shape[-1]
    nothing = addend.new_zeros(*addend.shape[:-1], dk)
    identity = torch.eye(dk, device=addend.device).expand(*starts.shape[:-1], dk)
    _, ends = follow(
        transition,
        torch.cat([nothing, addend], -1),
        torch.cat([identity, starts], -1),
        lines,
    )
    return ends[..., :dk], ends[..., dk:]
