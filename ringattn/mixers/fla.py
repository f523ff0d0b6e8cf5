"""flash-linear-attention's kernels (extra ``fla``) for what a rank computes of its own segments.

They know nothing of segments: every piece (a document in a segment) is a sequence to them. What a
first state adds to a piece that begins inside of a document is linear in it, and put in when it has
come: for a decay its factor is known; for a delta rule the kernel computes it, as more columns of v
that are 0, with the identity as first state, from which it makes the transition too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import numpy as np
import torch
from torch.nn import functional as F

from ringattn.execution.carriers import Comm, VirtualRank, VirtualWorld
from ringattn.mixers.inputs import Inputs
from ringattn.mixers.naive import recurrence
from ringattn.mixers.states import FirstStates
from ringattn.planning.layouts import Layout
from ringattn.planning.runs import Run
from ringattn.planning.segments import Piece, Segments
from ringattn.planning.state_exchange import StateExchange

VERSIONS = ("0.6.",)  # of fla-core, whose arguments and layouts are known here
WIDEST = 256  # dk that all of them take
_TOKENS, _OFF = 100, 3e-2  # of a proof; what half precision may differ by


def runs(v: torch.Tensor, dk: int) -> bool:
    """Whether they are used: on a GPU, in half precision (float32 would pass through their TF32),
    where they are installed."""
    half = v.dtype in (torch.bfloat16, torch.float16)
    return v.is_cuda and half and dk <= WIDEST and installed()


@lru_cache(maxsize=1)
def installed() -> bool:
    """Whether they are there, in a version that is known; of another one it is said once."""
    if find_spec("fla") is None:
        return False
    try:
        found = version("fla-core")
    except PackageNotFoundError:
        found = "of an unknown version"  # older ones came in one package
    if not found.startswith(VERSIONS):
        warnings.warn(
            f"fla-core {found} is not used by ringattn.mixers, which know {', '.join(VERSIONS)}x; "
            "they compute in torch",
            stacklevel=2,
        )
        return False
    return True


@lru_cache(maxsize=64)
def prove(
    rule: bool,
    vectors: bool,
    heads: int,
    dk: int,
    dv: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Compares the kernels for such heads with the definition, once for each kind and process, on
    random tokens of two documents, of which one goes over two segments. Raises RuntimeError."""
    draw = torch.Generator().manual_seed(0)
    shape = (1, _TOKENS, heads)
    q, k = (F.normalize(torch.randn(*shape, dk, generator=draw), dim=-1) for _ in range(2))
    v = torch.randn(*shape, dv, generator=draw)
    q, k, v = (x.to(device, dtype) for x in (q, k, v))
    decay = -0.1 * torch.rand(*shape, *((dk,) if vectors else ()), generator=draw).to(device)
    beta = torch.rand(*shape, generator=draw).to(device, dtype) if rule else None
    lengths, half = [_TOKENS - 20, 20], _TOKENS // 2
    layout = Layout(_TOKENS, ((Run(0, half), Run(half, _TOKENS)),))
    exchange = StateExchange(Segments(layout, lengths), "direct")
    with torch.no_grad():
        given = Inputs(q, k, v, decay, beta, 1.0, None)
        got = mix(given, exchange, VirtualRank(VirtualWorld(1), 0))
        exact = (None if x is None else x.double() for x in (q, k, v, decay, beta, None))
        want = recurrence(*exact, lengths)
    off = float((got.double() - want).norm() / want.norm())
    if not off < _OFF:
        raise RuntimeError(
            f"flash-linear-attention's kernel ({'delta rule' if rule else 'linear'}, heads of {dk} "
            f"x {dv}) is off by {off:.1e} from the recurrence on {device}: uninstall fla-core, and "
            "ringattn.mixers compute in torch"
        )


def mix(given: Inputs, exchange: StateExchange, comm: Comm) -> torch.Tensor:
    """What ``recurrent`` computes in chunks, of a rank with tokens, a decay of each. Collective."""
    k, v = given.k.to(given.v.dtype), given.v
    given = replace(given, q=given.q.to(v.dtype), k=k)
    segments, dk, dv = exchange.segments, k.shape[-1], v.shape[-1]
    pieces = segments.pieces(comm.rank)
    carried = [piece for piece in pieces if piece.carries]
    others = [piece for piece in pieces if not piece.carries]
    begin = v.new_zeros(k.shape[2], dk, dv, dtype=torch.float32)
    begin = begin if given.initial is None else begin + given.initial.float()
    parts: dict[int, _Part] = {}
    if given.beta is None:
        starts = [0.0 * begin if piece.carries else begin for piece in pieces]
        parts = _kernel(given, pieces, starts)
        for piece in carried:
            part = parts[piece.start]
            part.reach, part.transition = _decayed(given, piece)
    else:
        if others:
            parts |= _kernel(given, others, [begin] * len(others))
        if carried:
            wider = replace(given, v=torch.cat([v, torch.zeros_like(k)], -1))
            eye = torch.eye(dk, device=v.device).expand(len(begin), dk, dk)
            start = torch.cat([0.0 * begin, eye], -1)
            both = _kernel(wider, carried, [start] * len(carried))
            for at, part in both.items():
                out, reach = part.out.split([dv, dk], -1)
                addend, transition = part.addend.split([dv, dk], -1)
                parts[at] = _Part(out, addend, reach, transition)
    if exchange.forward.steps:
        way = (dk, dk) if given.beta is not None else (dk if given.vectors else 1, 1)
        first = _firsts(parts, way, pieces, exchange, comm)
        for piece in carried:
            part = parts[piece.start]
            more = torch.einsum("bthk,bhkv->bthv", part.reach.float(), first[piece.segment.number])
            part.out = part.out + more
        # Used in any case, so that every rank takes part in the exchange of the backward.
        part = parts[pieces[0].start]
        part.out = part.out + 0.0 * sum(state.sum() for state in first.values())
    return torch.cat([parts[piece.start].out.to(v.dtype) for piece in pieces], 1)


@dataclass
class _Part:
    """Of one piece: what it returns ``[batch, tokens, heads, dv]`` and does to a state ``[batch,
    heads, dk, ...]``; ``reach``: what its first state is read by ``[batch, tokens, heads, dk]``."""

    out: torch.Tensor
    addend: torch.Tensor
    reach: torch.Tensor | None = None
    transition: torch.Tensor | None = None


def _decayed(given: Inputs, piece: Piece) -> tuple[torch.Tensor, torch.Tensor]:
    """(reach, transition) of a piece without a delta rule."""
    q, decay = given.q[:, piece.start : piece.stop].float() * given.scale, given.decay
    if decay is None:
        return q, q.new_ones(q.shape[0], q.shape[2], 1, 1)
    log = decay[:, piece.start : piece.stop]
    total = (log if given.vectors else log[..., None]).double().cumsum(1)
    return q * total.float().exp(), total[:, -1].float().exp()[..., None]


def _firsts(
    parts: dict[int, _Part],
    way: tuple[int, int],
    pieces: Sequence[Piece],
    exchange: StateExchange,
    comm: Comm,
) -> dict[int, torch.Tensor]:
    """The first state of each of this rank's segments, by number; ``way``: the size of a
    transition, which ranks without one of their own have to know."""
    own = exchange.segments.of(comm.rank)
    any_part = parts[pieces[0].start]
    shape = (*any_part.addend.shape[:2], *way)
    added = {segment.number: torch.zeros_like(any_part.addend) for segment in own}
    through = {segment.number: any_part.addend.new_zeros(shape) for segment in own}
    for piece in pieces:
        segment = piece.segment
        if piece.last and exchange.segments.read(segment):
            added[segment.number] = parts[piece.start].addend
            if segment.passes:
                through[segment.number] = parts[piece.start].transition
    firsts = FirstStates(
        torch.stack([through[segment.number] for segment in own]),
        torch.stack([added[segment.number] for segment in own]),
        any_part.addend,
        exchange,
        comm,
    )
    return dict(zip((segment.number for segment in own), firsts.wait(), strict=True))


def _kernel(
    given: Inputs, pieces: Sequence[Piece], starts: Sequence[torch.Tensor]
) -> dict[int, _Part]:
    """Of pieces that begin with states ``[heads, dk, dv]``, by the tokens that they start at."""
    q, decay, beta = given.q, given.decay, given.beta
    batch, lengths = q.shape[0], [len(piece) for piece in pieces]

    def flat(x: torch.Tensor) -> torch.Tensor:
        """All pieces of all of the batch as one line, ``[1, batch * tokens, ...]``."""
        if sum(lengths) < x.shape[1]:
            x = torch.cat([x[:, piece.start : piece.stop] for piece in pieces], 1)
        return x.reshape(1, -1, *x.shape[2:])

    ends = np.cumsum([0, *lengths * batch])
    arguments = {"beta": flat(beta).to(q.dtype)} if beta is not None else {}
    if decay is not None:
        arguments["g"] = flat(decay.float())
    else:
        arguments["g"] = q.new_zeros(1, int(ends[-1]), q.shape[2], dtype=torch.float32)
    out, last = _function(beta is not None, given.vectors)(
        flat(q), flat(given.k), flat(given.v), **arguments,
        scale=given.scale,
        initial_state=torch.stack(list(starts) * batch).contiguous(),
        output_final_state=True,
        cu_seqlens=torch.from_numpy(ends).to(q.device),
    )  # fmt: skip
    outs = out.view(batch, sum(lengths), *out.shape[2:]).split(lengths, 1)
    lasts = last.view(batch, len(pieces), *last.shape[1:]).unbind(1)
    return {
        piece.start: _Part(*both)
        for piece, both in zip(pieces, zip(outs, lasts, strict=True), strict=True)
    }


def _function(rule: bool, vectors: bool) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """fla's, for a delta ``rule`` or not, with decays for heads or each of dk (``vectors``)."""
    if rule and vectors:
        from fla.ops.kda import chunk_kda as found
    elif rule:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule as found
    elif vectors:
        from fla.ops.gla import chunk_gla as found
    else:
        from fla.ops.simple_gla import chunk_simple_gla as found
    return found
