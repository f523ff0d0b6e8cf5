"""Dense attention over any bands: the definition of correct, in float64 when given float64.

Memory is batch x heads x queries x keys; meant for tests and short sequences.
"""

from collections.abc import Sequence

import torch
from einops import einsum, rearrange, repeat

from ringattn.slices import Band


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bands: Sequence[Band],
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> None:
    """See :mod:`ringattn.kernels`; v may have another head_dim than q and k."""
    scores = _scores(q, k, bands, scale, out.dtype)
    block_lse = torch.logsumexp(scores, -1)
    total = torch.logaddexp(lse, block_lse)
    # A row without any key so far has total = -inf; 0 in its place keeps exp() free of NaN.
    finite = total.masked_fill(total == -torch.inf, 0)
    weights = torch.exp(scores - finite[..., None])
    kept = torch.exp(lse - finite)
    out.mul_(rearrange(kept, "b h q -> b q h 1"))
    out.add_(einsum(weights, _heads(v, q, out.dtype), "b h q k, b k h d -> b q h d"))
    lse.copy_(total)


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    bands: Sequence[Band],
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    scale: float,
) -> None:
    """See :mod:`ringattn.kernels`."""
    dout = dout.to(dq.dtype)
    scores = _scores(q, k, bands, scale, dq.dtype)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    delta = rearrange((dout * out.to(dq.dtype)).sum(-1), "b q h -> b h q 1")
    dweights = einsum(dout, _heads(v, q, dq.dtype), "b q h d, b k h d -> b h q k")
    dscores = weights * (dweights - delta) * scale
    dq.add_(einsum(dscores, _heads(k, q, dq.dtype), "b h q k, b k h d -> b q h d"))
    dk.add_(_grouped(einsum(dscores, q.to(dq.dtype), "b h q k, b q h d -> b k h d"), k))
    dv.add_(_grouped(einsum(weights, dout, "b h q k, b q h d -> b k h d"), v))


def _scores(
    q: torch.Tensor, k: torch.Tensor, bands: Sequence[Band], scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """[batch, heads, queries, keys]; -inf outside of the bands."""
    allowed = torch.zeros(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
    for band in bands:
        apart = torch.arange(len(band.k), device=q.device) - torch.arange(
            len(band.q), device=q.device
        ).unsqueeze(1)
        rows = slice(band.q.start, band.q.stop, band.q.step)
        cols = slice(band.k.start, band.k.stop, band.k.step)
        allowed[rows, cols] |= (apart >= band.lo) & (apart <= band.hi)
    scores = einsum(q.to(dtype), _heads(k, q, dtype), "b q h d, b k h d -> b h q k") * scale
    return scores.masked_fill(~allowed, -torch.inf)


def _heads(x: torch.Tensor, q: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return repeat(x.to(dtype), "b k h d -> b k (h g) d", g=q.shape[2] // x.shape[2])


def _grouped(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return rearrange(grad, "b k (h g) d -> b k h g d", h=x.shape[2]).sum(3)
