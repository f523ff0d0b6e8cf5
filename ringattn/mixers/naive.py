"""The recurrences, token by token in one process: what every other version has to equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def recurrence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    initial: torch.Tensor | None = None,
    lengths: Sequence[int] | None = None,
) -> torch.Tensor:
    """``out_t = S_t^T q_t`` with ``S_t = D_t S_{t-1} + k_t v_t^T``, or with ``beta`` (the delta
    rule) ``S_t = D_t S_{t-1} + beta_t k_t (v_t - (D_t S_{t-1})^T k_t)^T``; ``D_t = diag exp
    decay_t``. Each document of ``lengths`` begins with ``initial``, or 0.

    q, k ``[batch, tokens, heads, dk]``, v ``[batch, tokens, heads, dv]``, decay ``[batch, tokens,
    heads]`` or ``[..., dk]``, beta ``[batch, tokens, heads]``, initial ``[heads, dk, dv]``. In the
    dtype of what is given: float64 for the definition.
    """
    batch, tokens, heads, dk = k.shape
    begins, at = set(), 0
    for length in lengths if lengths is not None else [tokens]:
        begins.add(at)
        at += length
    zero = v.new_zeros(batch, heads, dk, v.shape[-1])
    first = zero if initial is None else zero + initial
    state, out = first, []
    for t in range(tokens):
        state = first if t in begins else state
        if decay is not None:
            factor = decay[:, t].exp()
            state = state * (factor[..., None, None] if decay.dim() == 3 else factor[..., None])
        value = v[:, t]
        if beta is not None:
            told = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
            value = beta[:, t, :, None] * (value - told)
        state = state + k[:, t, :, :, None] * value[:, :, None]
        out.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(out, 1) if out else v[:, :0]


def convolution(
    x: torch.Tensor, weight: torch.Tensor, lengths: Sequence[int] | None = None
) -> torch.Tensor:
    """``out_t = sum over j of weight[:, j] x_{t - width + 1 + j}``, of the tokens of a document of
    ``lengths`` (None: one); x ``[batch, tokens, channels]``, weight ``[channels, width]``."""
    parts = []
    for part in x.split(list(lengths) if lengths is not None else [x.shape[1]], 1):
        out = torch.zeros_like(part)
        for j in range(weight.shape[1]):
            back = weight.shape[1] - 1 - j
            if back < part.shape[1]:
                moved = part[:, : part.shape[1] - back] * weight[:, j]
                out = out + torch.nn.functional.pad(moved, (0, 0, back, 0))
        parts.append(out)
    return torch.cat(parts, 1)
