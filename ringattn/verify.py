"""How far attention is from float64, as a whole and in its worst row.

The measure of ``ringattn verify``, for use in one's own tests as well: :func:`oracle` gives the
truth, :func:`compare` holds a result, and one kernel call on the whole sequence, against it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ringattn.kernels import Scores, reference
from ringattn.planning.masks import Mask
from ringattn.planning.runs import Run
from ringattn.planning.slices import Band, Slice

LIMIT = 1.1  # error of a plan over that of one kernel call
# Below this share of the values an error is rounding of the partial states, whose order a plan
# changes; and the share of a row's own values that its rounding may be off beyond one call's.
_FLOOR = {torch.float64: 1e-12}
_ROW = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float32: 1e-3, torch.float64: 1e-9}
_ORACLE_SCORES = 2**24  # that the oracle holds at a time


def oracle(
    mask: Mask,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    softcap: float = 0.0,
) -> list[torch.Tensor]:
    """[out, dq, dk, dv] in float64 by the dense reference kernel, a head and some rows at a time;
    no plan, no layout and no executor is involved. ``q`` and ``dout`` ``[batch, tokens, heads,
    head_dim]``, ``k`` and ``v`` with kv_heads, of the whole sequence that ``mask`` is of;
    ``softcap`` as of :func:`ringattn.ring_attention`."""
    q, k, v, dout = (x.double() for x in (q, k, v, dout))
    out, dq, dk, dv = (torch.zeros_like(x) for x in (dout, q, k, v))
    together, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    height = max(1, _ORACLE_SCORES // max(1, mask.n_k))
    for low in range(0, mask.n_q, height):
        rows = Run(low, min(mask.n_q, low + height))
        parts = (part & Slice(rows, part.k, part.lo, part.hi) for part in mask.slices)
        bands = [
            Band(Run(b.q.start - low, b.q.stop - low, b.q.step), b.k, b.lo, b.hi)
            for part in parts
            for b in part.bands()
        ]
        if not bands:
            continue
        at = slice(rows.start, rows.stop)
        for batch in range(q.shape[0]):
            for head in range(q.shape[2]):
                here = (slice(batch, batch + 1), at, slice(head, head + 1))
                kv = (
                    slice(batch, batch + 1),
                    slice(None),
                    slice(head // together, head // together + 1),
                )
                lse = q.new_full((1, 1, len(rows)), -torch.inf)
                scores = Scores(scale, softcap)
                reference.forward(q[here], k[kv], v[kv], bands, None, out[here], lse, scores)
                prepared = reference.prepare(dout[here], out[here], lse)
                reference.backward(
                    dout[here], q[here], k[kv], v[kv], prepared, bands,
                    dq[here], dk[kv], dv[kv], scores, True, True,
                )  # fmt: skip
    return [out, dq, dk, dv]


@dataclass(frozen=True)
class Comparison:
    """One tensor: RMS errors over the RMS of float64, ``ours`` and that of ``one_call``, and its
    row (one token of one head) that is furthest off, ``worst_at`` [batch, token, head], over what
    it may be: ``worst`` of more than 1 is too far. ``ok``: neither is."""

    ours: float
    one_call: float
    worst: float
    worst_at: tuple[int, int, int]  # batch, token, head
    ok: bool

    @property
    def ratio(self) -> float:
        """Our error over that of the one call; 1 where that is 0."""
        return self.ours / self.one_call if self.one_call else 1.0


def compare(got: torch.Tensor, one_call: torch.Tensor, want: torch.Tensor) -> Comparison:
    """``got`` and ``one_call`` ``[batch, tokens, heads, head_dim]`` in one dtype against ``want``
    in float64.

    The whole may be ``LIMIT`` times as far off as the one call. A wrong row can hide in the whole:
    under a causal mask the last keys have next to no gradient. So each row is held against itself:
    its error may be twice that of the one call, plus a small share of its own values.
    """
    floor, share = _FLOOR.get(got.dtype, 1e-6), _ROW[got.dtype]
    ours, theirs, whole = rms_error(got, want), rms_error(one_call, want), want.norm()
    if not want.numel():
        return Comparison(0.0, 0.0, 0.0, (0, 0, 0), True)
    rows, rounding = want.norm(dim=-1), 10 * floor * whole / want[..., 0].numel() ** 0.5
    error, others = ((x.double() - want).norm(dim=-1) for x in (got, one_call))
    allowed = 2 * others + share * rows + rounding
    excess = (error / allowed.clamp(min=1e-300)).nan_to_num(torch.inf, torch.inf)
    at = int(excess.argmax())
    batch, token, head = (int(x) for x in torch.unravel_index(torch.tensor(at), excess.shape))
    worst = float(excess.flatten()[at])
    return Comparison(
        ours, theirs, worst, (batch, token, head), ours <= max(LIMIT * theirs, floor) and worst <= 1
    )


def rms_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Root mean square of the difference of ``got`` and ``want`` over that of ``want``, float64;
    NaN counts as infinite."""
    error = (got.double() - want).norm() / want.norm().clamp(min=1e-30)
    return float(error.nan_to_num(torch.inf, torch.inf))
