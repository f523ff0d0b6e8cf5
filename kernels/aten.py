"""torch's own fused attention, given the pieces of a band: the kernel for CPUs.

On the CPU each piece is one call of the flash operator behind scaled_dot_product_attention,
which returns the log-sum-exp and whose backward accepts the global (out, lse). It is float32
(or wider) inside: half-precision inputs are widened once per call, so no partial result is
rounded. Elsewhere, with a softcap, and where v has another head_dim than k, a piece is tiled matrix
products.
"""

from collections.abc import Iterator, Sequence

import torch
from einops import rearrange
from ringattn.kernels import Scores, begin, end
from ringattn.kernels.pieces import Piece, cut

from ringattn.planning.runs import Run
from ringattn.planning.slices import Band

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Scores that the tiled fallback holds at a time.
_TILE_SCORES = 2**24


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
    """See :class:`ringattn.kernels.Kernel`."""
    state = begin(out, False) if partial is None else partial
    q, k, v = (_readable(x, state.dtype) for x in (q, k, v))
    for (q_, out_), (k_, v_), lse_, piece in _views((q, state), (k, v), lse, bands):
        block_out, block_lse = _attend(q_, k_, v_, piece, scores)
        # out + w (block - out) with w = block's share: one pass, and no overflow at any gap.
        share = torch.sigmoid(block_lse - lse_)
        out_.lerp_(block_out, share[..., None])
        torch.logaddexp(lse_, block_lse, out=block_lse)
        lse_.copy_(block_lse)
    end(state, out)


def prepare(
    dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out as the flash operator reads it, log-sum-exp)."""
    return _readable(out, lse.dtype), lse


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
    """See :class:`ringattn.kernels.Kernel`. Grouped heads take one call per member: nothing
    repeats."""
    out, lse = prepared
    sums = [begin(x, add) for x, add in ((dq, add_q), (dk, add_k), (dv, add_k))]
    dout, q, k, v = (_readable(x, lse.dtype) for x in (dout, q, k, v))
    groups = q.shape[2] // k.shape[2]
    for g in range(groups):
        queries = tuple(x[:, :, g::groups] for x in (dout, q, out, sums[0]))
        views = _views(queries, (k, v, *sums[1:]), lse[:, g::groups], bands)
        for (dout_, q_, out_, dq_), (k_, v_, dk_, dv_), lse_, piece in views:
            grads = _attend_backward(dout_, q_, k_, v_, out_, lse_, piece, scores)
            dq_.add_(grads[0])
            # Blocks that overlap on the key axis are added in turns.
            turns = -(-piece.keys // piece.stride) if piece.count > 1 else 1
            for turn in range(turns):
                dk_[turn::turns].add_(grads[1][turn::turns])
                dv_[turn::turns].add_(grads[2][turn::turns])
    for state, x in zip(sums, (dq, dk, dv), strict=True):
        end(state, x)


def finish(dq: torch.Tensor, dtype: torch.dtype, scores: Scores) -> torch.Tensor:
    """See :class:`ringattn.kernels.Kernel`."""
    return dq.to(dtype)


def refusal(dtype: torch.dtype, device: torch.device, head_dim: int, v_dim: int) -> None:
    """It can do anything."""


def _readable(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In ``dtype``, the last axis dense: the flash operator reads it so, whatever its stride."""
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def _views(
    queries: Sequence[torch.Tensor],
    keys: Sequence[torch.Tensor],
    lse: torch.Tensor,
    bands: Sequence[Band],
) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, Piece]]:
    """Per piece, views ``[count, heads, rows or keys, head_dim]`` and lse ``[count, heads, rows]``.

    A piece with one rectangle keeps the batch in front instead; one with several goes through
    the batch one by one.
    """
    for band in bands:
        on_q = [_along(x.transpose(1, 2), band.q) for x in queries]
        on_k = [_along(x.transpose(1, 2), band.k) for x in keys]
        on_lse = _along(lse[..., None], band.q)
        for piece in cut(len(band.q), len(band.k), band.lo, band.hi):
            batches = [slice(None)] if piece.count == 1 else range(lse.shape[0])
            for b in batches:
                yield (
                    [_window(x[b], piece.q, piece.rows, piece) for x in on_q],
                    [_window(x[b], piece.k, piece.keys, piece) for x in on_k],
                    _window(on_lse[b], piece.q, piece.rows, piece)[..., 0],
                    piece,
                )


def _along(x: torch.Tensor, run: Run) -> torch.Tensor:
    """The tokens of ``run``; x is [batch, heads, tokens, ...]."""
    return x[:, :, run.start : run.stop : run.step]


def _window(x: torch.Tensor, start: int, size: int, piece: Piece) -> torch.Tensor:
    if piece.count == 1:
        return x[:, :, start : start + size]
    span = (piece.count - 1) * piece.stride + size
    blocks = x[:, start : start + span].unfold(1, size, piece.stride)
    return rearrange(blocks, "heads count dim tokens -> count heads tokens dim")


def _restriction(piece: Piece, like: torch.Tensor) -> tuple[bool, torch.Tensor | None]:
    """(is_causal, attn_mask) for the fused operator, which is causal from the top left."""
    if piece.lo is None and piece.hi == 0:
        return True, None
    return False, _mask(piece, like)


def _mask(piece: Piece, like: torch.Tensor) -> torch.Tensor | None:
    """Additive [rows, keys] of 0 and -inf; None where every pair exists."""
    if piece.lo is None and piece.hi is None:
        return None
    shape = (piece.rows, piece.keys)
    allowed = torch.ones(shape, dtype=torch.bool, device=like.device)
    if piece.hi is not None:
        allowed = allowed.tril(piece.hi)
    if piece.lo is not None:
        allowed = allowed.triu(piece.lo)
    return torch.zeros(shape, dtype=like.dtype, device=like.device).masked_fill(
        ~allowed, -torch.inf
    )


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    piece: Piece,
    scores: Scores,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of one piece; q is [count, heads, rows, head_dim]."""
    if _fused(q, v, scores):
        causal, mask = _restriction(piece, q)
        return _flash(q, k, v, 0.0, causal, attn_mask=mask, scale=scores.sm_scale)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3])
    k, v = _repeated(k, q), _repeated(v, q)
    mask = _mask(piece, q)
    for rows in _row_tiles(q, k):
        s, _ = _scores(q[:, :, rows], k, scores)
        if mask is not None:
            s += mask[rows]
        lse[:, :, rows] = torch.logsumexp(s, -1)
        out[:, :, rows] = torch.exp(s - lse[:, :, rows, None]) @ v
    return out, lse


def _attend_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    piece: Piece,
    scores: Scores,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) of one piece, with the global out and lse; equal numbers of heads."""
    if _fused(q, v, scores):
        causal, mask = _restriction(piece, q)
        return _flash_backward(
            dout, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scores.sm_scale
        )
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    mask = _mask(piece, q)
    for rows in _row_tiles(q, k):
        s, slope = _scores(q[:, :, rows], k, scores)
        if mask is not None:
            s += mask[rows]
        weights = torch.exp(s - lse[:, :, rows, None])
        delta = (dout[:, :, rows] * out[:, :, rows]).sum(-1, keepdim=True)
        dscores = weights * (dout[:, :, rows] @ v.mT - delta) * slope
        dq[:, :, rows] = dscores @ k
        dk += dscores.mT @ q[:, :, rows]
        dv += weights.mT @ dout[:, :, rows]
    return dq, dk, dv


def _scores(
    q: torch.Tensor, k: torch.Tensor, scores: Scores
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """The scores, and their slope by q k^T."""
    s = q @ k.mT * scores.sm_scale
    if not scores.softcap:
        return s, scores.sm_scale
    bent = torch.tanh(s / scores.softcap)
    return bent * scores.softcap, (1 - bent**2) * scores.sm_scale


def _fused(q: torch.Tensor, v: torch.Tensor, scores: Scores) -> bool:
    return q.device.type == "cpu" and q.shape[-1] == v.shape[-1] and not scores.softcap


def _repeated(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _row_tiles(q: torch.Tensor, k: torch.Tensor) -> Iterator[slice]:
    rows = max(1, _TILE_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    return (slice(at, at + rows) for at in range(0, q.shape[2], rows))
