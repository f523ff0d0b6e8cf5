"""Dense attention over any bands: the definition of correct, in float64 when given float64.

Memory is batch x heads x queries x keys; meant for tests and short sequences.
"""

from collections.abc import Sequence

import torch
from einops import einsum, rearrange, repeat
from ringattn.kernels import Scores, begin, end

from ringattn.planning.slices import Band


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bands: Sequence[Band],
    partial: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scores: Scores,
) -> None:
    """See :class:`ringattn.kernels.Kernel`; v may have another head_dim than q and k."""
    state = begin(out, False) if partial is None else partial
    s = _scores(q, k, bands, scores, state.dtype)[0]
    block_lse = torch.logsumexp(s, -1)
    total = torch.logaddexp(lse, block_lse)
    # A row without any key so far has total = -inf; 0 in its place keeps exp() free of NaN.
    finite = total.masked_fill(total == -torch.inf, 0)
    weights = torch.exp(s - finite[..., None])
    decay = torch.exp(lse - finite)
    state.mul_(rearrange(decay, "b h q -> b q h 1"))
    state.add_(einsum(weights, _heads(v, q, state.dtype), "b h q k, b k h d -> b q h d"))
    lse.copy_(total)
    end(state, out)


def prepare(
    dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum(dout * out) over head_dim, log-sum-exp), ``[batch, heads, tokens]``."""
    products = dout.to(lse.dtype) * out.to(lse.dtype)
    return rearrange(products.sum(-1), "b q h -> b h q"), lse


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prepared: tuple[torch.Tensor, torch.Tensor],
    bands: Sequence[Band],
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    scores: Scores,
    add_q: bool,
    add_k: bool,
) -> None:
    """See :class:`ringattn.kernels.Kernel`."""
    delta, lse = prepared
    sums = [begin(x, add) for x, add in ((dq, add_q), (dk, add_k), (dv, add_k))]
    dtype = lse.dtype
    dout = dout.to(dtype)
    s, slope = _scores(q, k, bands, scores, dtype)
    weights = torch.exp(s - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    dweights = einsum(dout, _heads(v, q, dtype), "b q h d, b k h d -> b h q k")
    dscores = weights * (dweights - delta[..., None]) * slope
    sums[0].add_(einsum(dscores, _heads(k, q, dtype), "b h q k, b k h d -> b q h d"))
    sums[1].add_(_grouped(einsum(dscores, q.to(dtype), "b h q k, b q h d -> b k h d"), k))
    sums[2].add_(_grouped(einsum(weights, dout, "b h q k, b q h d -> b k h d"), v))
    for state, x in zip(sums, (dq, dk, dv), strict=True):
        end(state, x)


def finish(dq: torch.Tensor, dtype: torch.dtype, scores: Scores) -> torch.Tensor:
    """See :class:`ringattn.kernels.Kernel`."""
    return dq.to(dtype)


def refusal(dtype: torch.dtype, device: torch.device, head_dim: int, v_dim: int) -> None:
    """It can do anything."""


def _scores(
    q: torch.Tensor,
    k: torch.Tensor,
    bands: Sequence[Band],
    scores: Scores,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """[batch, heads, queries, keys], -inf outside of the bands; and their slope by q k^T."""
    allowed = torch.zeros(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
    for band in bands:
        apart = torch.arange(len(band.k), device=q.device) - torch.arange(
            len(band.q), device=q.device
        ).unsqueeze(1)
        rows = slice(band.q.start, band.q.stop, band.q.step)
        cols = slice(band.k.start, band.k.stop, band.k.step)
        allowed[rows, cols] |= (apart >= band.lo) & (apart <= band.hi)
    s = einsum(q.to(dtype), _heads(k, q, dtype), "b q h d, b k h d -> b h q k")
    s, slope = s * scores.sm_scale, scores.sm_scale
    if scores.softcap:
        bent = torch.tanh(s / scores.softcap)
        s, slope = bent * scores.softcap, (1 - bent**2) * scores.sm_scale
    return s.masked_fill(~allowed, -torch.inf), slope


def _heads(x: torch.Tensor, q: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return repeat(x.to(dtype), "b k h d -> b k (h g) d", g=q.shape[2] // x.shape[2])


def _grouped(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return rearrange(grad, "b k (h g) d -> b k h g d", h=x.shape[2]).sum(3)
