"""Cross-entropy of a linear head in chunks of tokens: logits of all tokens never exist.

torch's own ``linear_cross_entropy`` (2.13) does the same, but in bf16 it rounds the loss itself to
bf16 (off by 0.5 % on a sum over 1,000 tokens): ``benchmarks/loss.py`` compares them.
"""

from __future__ import annotations

import torch
from torch import nn

from ringattn.batches import IGNORED

LEAST = 64  # tokens: a chunk of fewer rows leaves the matrix product inefficient


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    chunk: int | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(sum over supervised tokens, the loss of every token, whether each token's label is the
    likeliest): float32 scalar and ``labels.shape``, and bool ``labels.shape`` where no gradient is
    wanted, else None.

    hidden ``[..., dim]``, weight ``[vocab, dim]`` in the same dtype, labels ``[...]`` with IGNORED
    where not supervised (loss 0; the sum is connected, and 0, if no token is). Only the sum has a
    gradient. It is computed in the forward, chunk by chunk, so that nothing is computed twice:
    three matrix products for each chunk (two if ``weight`` is frozen) and no logits kept. Products
    are in the dtype of ``hidden``, the rest and the gradient of ``weight`` over the chunks in
    float32.

    ``chunk``: tokens at a time. None: as many as make a chunk's logits as large as ``hidden``.
    ``softcap``: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2).
    """
    if chunk is None:
        tokens = labels.numel()
        chunk = max(LEAST, tokens * hidden.shape[-1] // max(weight.shape[0], 1))
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return (*_Chunked.apply(hidden, weight, labels, chunk, softcap), None)
    losses, correct = [], []
    for x, y in zip(hidden.flatten(0, -2).split(chunk), labels.flatten().split(chunk), strict=True):
        logits = capped((x @ weight.T).float(), softcap)
        losses.append(
            nn.functional.cross_entropy(logits, y, ignore_index=IGNORED, reduction="none")
        )
        correct.append(logits.argmax(-1) == y)
    each = torch.cat(losses).view(labels.shape)
    return each.sum(), each, torch.cat(correct).view(labels.shape)


def capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Between -softcap and softcap, if there is one."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def liger_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    softcap: float | None = None,
) -> torch.Tensor:
    """The sum of :func:`chunked_cross_entropy` by liger-kernel's fused Triton kernels (a GPU)."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORED, reduction="sum", accum_dtype=torch.float32, softcap=softcap
    )
    return loss(weight, hidden.flatten(0, -2), labels.flatten())


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, chunk, softcap):
        rows, flat = hidden.flatten(0, -2), labels.flatten()
        losses = rows.new_zeros(len(rows), dtype=torch.float32)
        d_rows = torch.empty_like(rows)
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(weight, dtype=torch.float32)
        for at in range(0, len(rows), chunk):
            part = slice(at, at + chunk)
            x, supervised = rows[part], flat[part] != IGNORED
            index = flat[part].where(supervised, 0)[:, None]
            logits = capped((x @ weight.T).float(), softcap)
            slope = None if softcap is None else 1 - (logits / softcap).square()
            lse = logits.logsumexp(-1, keepdim=True)
            losses[part] = (lse - logits.gather(-1, index))[:, 0].where(supervised, 0.0)
            # In place: softmax minus one-hot, 0 where not supervised.
            logits.sub_(lse).exp_()
            logits.scatter_add_(-1, index, logits.new_full(index.shape, -1.0))
            logits.masked_fill_(~supervised[:, None], 0.0)
            if slope is not None:
                logits.mul_(slope)
            d_logits = logits.to(x.dtype)
            d_rows[part] = d_logits @ weight
            if d_weight is None:
                continue
            if d_weight.dtype == x.dtype:
                d_weight.addmm_(d_logits.T, x)
            else:
                d_weight += d_logits.T @ x
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        ctx.gradients = d_rows.view_as(hidden), d_weight
        losses = losses.view(labels.shape)
        ctx.mark_non_differentiable(losses)
        ctx.set_materialize_grads(False)
        return losses.sum(), losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        if grad is None:
            return None, None, None, None, None
        if ctx.gradients is None:
            raise RuntimeError("the loss has one backward: its gradients are scaled in place")
        d_hidden, d_weight = ctx.gradients
        ctx.gradients = None
        d_weight = None if d_weight is None else d_weight.mul_(grad)
        return d_hidden.mul_(grad), d_weight, None, None, None
