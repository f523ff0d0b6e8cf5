"""Fused Triton kernels for GPUs: one launch per step of a plan and pass, over all of its bands.

``forward`` and ``backward`` are what :mod:`ringattn.kernels` asks of a kernel. The rooms: ``work``
lists which tiles meet which bands, ``launch`` is the pinned table, ``calls`` puts both and the
tensors together, ``fwd`` and ``bwd`` are the kernels, ``tile`` what they share.

With TRITON_INTERPRET=1 set before this module is imported the kernels run on the CPU, slowly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from ringattn.kernels import Scores
from ringattn.kernels.call import Call, capability, dense, kept_with, repeated
from ringattn.kernels.triton import bwd, calls

from ringattn.planning.slices import Band

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST = 256
Prepared = tuple[torch.Tensor, torch.Tensor]

INTERPRETED = not isinstance(bwd.prepare, triton.runtime.JITFunction)


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
    """See :class:`ringattn.kernels.Kernel`; what :func:`refusal` refuses is not checked again."""
    q, k, v = dense(q), dense(k), dense(v)

    def make() -> Iterator[Call]:
        yield calls.forward(architecture(q.device), q, k, v, bands, partial, out, lse, scores)

    repeated(kept_with(bands), ("triton forward", scores), (q, k, v, partial, out, lse), make)


def prepare(dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> Prepared:
    """The log-sum-exp in base 2 and delta = sum(dout * out), ``[batch, heads, tokens]``, in rows
    that the copy engine can read: of a multiple of 16 bytes."""
    *heads, tokens = lse.shape
    pitch = -(-tokens // 4) * 4
    lse2, delta = lse.new_empty(2, *heads, pitch).unbind(0)
    if pitch > tokens:
        lse2, delta = lse2[..., :tokens], delta[..., :tokens]
    inputs = (dense(dout), dense(out), lse.contiguous(), lse2, delta)
    if len(_PREPARED) > _FORMS:
        _PREPARED.clear()
    repeated(_PREPARED, "prepare", inputs, lambda: [calls.prepare(*inputs)])
    return lse2, delta


# The calls of ``prepare``, which knows no plan to keep them with: so many of them.
_PREPARED: dict[Any, Any] = {}
_FORMS = 64


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prepared: Prepared,
    bands: Sequence[Band],
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    scores: Scores,
    add_q: bool,
    add_k: bool,
) -> None:
    """See :class:`ringattn.kernels.Kernel`; ``dq`` is without ``sm_scale``."""
    inputs = (dense(dout), dense(q), dense(k), dense(v), *prepared)

    def make() -> Iterator[Call]:
        outputs = (bands, dq, dk, dv, scores, add_q, add_k)
        return calls.backward(architecture(q.device), *inputs, *outputs)

    key = ("triton backward", scores, add_q, add_k)
    repeated(kept_with(bands), key, (*inputs, dq, dk, dv), make)


def finish(dq: torch.Tensor, dtype: torch.dtype, scores: Scores) -> torch.Tensor:
    """See :class:`ringattn.kernels.Kernel`. One pass over dq; rounded once."""
    out = dq if dq.dtype == dtype else torch.empty_like(dq, dtype=dtype)
    return torch.mul(dq, scores.sm_scale, out=out)


def refusal(dtype: torch.dtype, device: torch.device, head_dim: int, v_dim: int) -> str | None:
    """Why these kernels cannot do it, and what to do instead; None if they can."""
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        return f"computes in bfloat16, float16 and float32, not {name}; use kernel='reference'"
    if max(head_dim, v_dim) > LARGEST:
        return (
            f"goes up to head_dim {LARGEST}, got {head_dim} (q, k) and {v_dim} (v); "
            "use kernel='aten', or more heads of less head_dim"
        )
    if INTERPRETED:
        if dtype != torch.bfloat16:
            return None
        return (
            "runs in Triton's interpreter here (TRITON_INTERPRET=1), which computes garbage in "
            "bfloat16; use float16 or float32"
        )
    if device.type != "cuda":
        return (
            f"runs on a GPU, the tensors are on {device}; use kernel='aten', or set "
            "TRITON_INTERPRET=1 before the import to run it slowly in Triton's interpreter"
        )
    if not torch.version.hip and capability(device) < (8, 0):
        return f"needs compute capability 8.0 or newer, {device} has less; use kernel='aten'"
    return None


def architecture(device: torch.device) -> str:
    """The launch table's name for what runs here: its own, or one whose lines are right for it."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    # 12.x has neither wgmma nor tcgen05 and the shared memory of 8.6: the lines of 8.0.
    major = capability(device)[0]
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")
