"""Fused kernels for Hopper in Gluon: warps that copy, warps that compute, five products backward.

The launch table says which passes, sizes and architectures they serve. The rest goes to the Triton
kernels, which share all conventions, call by call: masks that step, views that the copy engine
cannot read, and what has no line. The rooms: ``calls`` puts tensors and work lists together,
``fwd`` and ``bwd`` are the kernels, ``tile`` what they share, ``check`` proves them on a new GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from ringattn.kernels import Scores, triton
from ringattn.kernels.call import Call, aligned, capability, dense, kept_with, repeated, stepped
from ringattn.kernels.launch import Launch, gluon_line
from ringattn.kernels.triton import architecture

from ringattn.planning.slices import Band

try:
    from ringattn.kernels.gluon import calls, check

    MISSING = check.missing()
except ImportError as error:
    MISSING = [str(error)]

DTYPES = (torch.bfloat16, torch.float16)

prepare = triton.prepare
finish = triton.finish


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
    q, k, v = dense(q), dense(k), dense(v)

    def make() -> Iterator[Call]:
        line = _line("forward", q, v, (q, k, v), bands, scores)
        if partial is not None and partial.stride() != out.stride():
            line = None
        inputs = (q, k, v, bands, partial, out, lse, scores)
        if line is None:
            yield triton.calls.forward(triton.architecture(q.device), *inputs)
        else:
            yield calls.forward(line, *inputs)

    repeated(kept_with(bands), ("gluon forward", scores), (q, k, v, partial, out, lse), make)


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prepared: triton.Prepared,
    bands: Sequence[Band],
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    scores: Scores,
    add_q: bool,
    add_k: bool,
) -> None:
    """See :class:`ringattn.kernels.Kernel`; ``dq`` is without ``sm_scale``."""
    dout, q, k, v = dense(dout), dense(q), dense(k), dense(v)
    inputs = (dout, q, k, v, *prepared)

    def make() -> Iterator[Call]:
        line = _line("backward", q, v, (q, k, v, dout, dq), bands, scores)
        outputs = (bands, dq, dk, dv, scores, add_q, add_k)
        if line is None:
            yield from triton.calls.backward(triton.architecture(q.device), *inputs, *outputs)
        else:
            yield calls.backward(line, *inputs, *outputs)

    key = ("gluon backward", scores, add_q, add_k)
    repeated(kept_with(bands), key, (*inputs, dq, dk, dv), make)


def _line(
    name: str,
    q: torch.Tensor,
    v: torch.Tensor,
    copied: Sequence[torch.Tensor],
    bands: Sequence[Band],
    scores: Scores,
) -> Launch | None:
    """The table's line for a pass; None: the Triton kernels serve it."""
    if q.dtype not in DTYPES or stepped(bands) or not all(aligned(x) for x in copied):
        return None
    if not q.numel() or not v.numel():
        return None
    dims = (q.shape[3], v.shape[3])
    return gluon_line(architecture(q.device), name, *dims, scores.softcap > 0)


def refusal(dtype: torch.dtype, device: torch.device, head_dim: int, v_dim: int) -> str | None:
    """Why these kernels cannot do it, and what to do instead; None if they can."""
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        return f"computes in bfloat16 and float16, not {name}; use kernel='triton'"
    if device.type != "cuda":
        return f"runs on a GPU, the tensors are on {device}; use kernel='aten'"
    if torch.version.hip or capability(device) != (9, 0):
        return f"is written for Hopper (compute capability 9.0), {device} is another; use 'triton'"
    if gluon_line(architecture(device), "forward", head_dim, v_dim) is None:
        return f"has no line for head_dim {head_dim} (v: {v_dim}); use kernel='triton'"
    return _problem(device, dtype, head_dim, v_dim)


@cache
def _problem(device: torch.device, dtype: torch.dtype, head_dim: int, v_dim: int) -> str | None:
    """What keeps the kernels from being used on a GPU that they are for; said once."""
    if MISSING:
        problem = f"needs a newer Triton, whose Gluon has {', '.join(MISSING)}"
    elif problem := check.disagreement(device, dtype, head_dim, v_dim):
        problem = f"does not work here (head_dim {head_dim}, v {v_dim}): the kernels {problem}"
    else:
        return None
    warnings.warn(f"kernel='gluon' {problem}; the Triton kernels serve", stacklevel=2)
    return f"{problem}; use kernel='triton'"
