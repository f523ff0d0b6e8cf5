"""Dense float64 attention with its gradients, by autograd: nothing shared with the library."""

import torch


def attention(q, k, v, dense, dout, scale=None, softcap=0.0, sinks=None):
    """(out, dq, dk, dv) in float64, and dsinks where there are sinks; dense is a bool array
    [queries, keys]."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v, sinks) if x is not None]
    weights, _, values = _weights(*leaves[:3], dense, scale, softcap, *leaves[3:])
    out = torch.einsum("bhqk,bkhd->bqhd", weights, values)
    return out.detach(), *torch.autograd.grad(out, leaves, dout.double())


def _weights(q, k, v, dense, scale, softcap, sinks=None):
    """[batch, heads, queries, keys], and k and v with a head for each of q."""
    groups = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(groups, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    allowed = torch.from_numpy(dense)
    # Rows without a key: softmax over an all-zero row, then weights set to zero.
    scores = scores.masked_fill(~allowed, -1e300)
    if sinks is not None:
        # One more key, without a value; then no row is without a key.
        column = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    weights = torch.softmax(scores, -1)[..., : dense.shape[1]].masked_fill(~allowed, 0)
    return weights, keys, values


def half_error(got, want, q, k, v, dense, dout, scale=None, softcap=0.0):
    """Largest difference of out, dq, dk and dv, over the largest sum of the magnitudes of the terms
    that each is summed from. Rounding to half precision on the way, of out above all, is relative
    to these: where the values of all keys are alike, so that dq all but cancels, no kernel is
    better."""
    q, k, v, dout = (x.detach().double() for x in (q, k, v, dout))
    weights, keys, values = _weights(q, k, v, dense, scale, softcap)
    dp = torch.einsum("bqhd,bkhd->bhqk", dout, values).abs()
    delta = torch.einsum("bqhd,bqhd->bhq", dout.abs(), want[0].abs())
    ds = weights * (dp + delta[..., None]) * (q.shape[-1] ** -0.5 if scale is None else scale)
    terms = (
        torch.einsum("bhqk,bkhd->bqhd", weights, values.abs()),
        torch.einsum("bhqk,bkhd->bqhd", ds, keys.abs()),
        torch.einsum("bhqk,bqhd->bkhd", ds, q.abs()),  # of each head of q
        torch.einsum("bhqk,bqhd->bkhd", weights, dout.abs()),
    )
    gaps = ((a.double() - b).abs().max().item() for a, b in zip(got, want, strict=True))
    return max(gap / max(x.max().item(), 1e-3) for gap, x in zip(gaps, terms, strict=True))


def error(got, want):
    """Largest difference over the largest value; for inputs of order one. A gradient that is zero
    but for rounding (a row with a single key: terms of order one cancel) counts against 0.5."""
    if not want.numel():
        return 0.0
    gap = (got.double() - want).abs().max().item()
    return gap / max(want.abs().max().item(), 0.5)


def rms_error(got, want):
    """Root mean square of the difference over that of the value: every element counts."""
    return ((got.double() - want).norm() / want.norm()).item()
