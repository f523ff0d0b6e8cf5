"""Block kernels: attention of local queries over one held block of keys, for a list of bands.

Every kernel is a module with three functions. Tensors are ``[batch, tokens, heads, head_dim]``
(K/V may have fewer heads: head h reads K/V head ``h // (heads // kv_heads)``), log-sum-exp is
``[batch, heads, tokens]``; bands index the tokens of q and of k, and the list is never empty.
Running states are float32 (float64 for float64 inputs) between all steps.

``forward(q, k, v, bands, partial, out, lse, scale, softcap)``
    merges the attention over ``bands`` into the running state: ``partial`` is the output of the
    steps before (None: nothing yet) and may be overwritten; the result goes to ``out``, which is
    ``partial`` itself, a new state, or the final output in the dtype of q. ``lse`` is updated in
    place; where it begins above -inf, as at the logit of an attention sink, that much weight
    is already spent on an output of 0. With ``softcap`` scores are
    ``softcap * tanh(scores / softcap)``; 0 for none.
``prepare(dout, out, lse)``
    what ``backward`` needs to know of the final, global out and lse: once for all steps.
``backward(dout, q, k, v, prepared, bands, dq, dk, dv, scale, softcap, add_q, add_k)``
    adds into ``dq`` and ``dk``, ``dv``, in place. Without ``add_q`` (``add_k``) dq (dk and dv)
    hold nothing yet: all of them is written, and they may have the dtype of q.
"""

from __future__ import annotations

from types import ModuleType

import torch

# The kernels by name; each is a module of this package, imported when it is first used.
NAMES = ("triton", "aten", "reference")


def select(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    head_dim: int,
    v_dim: int | None = None,
) -> ModuleType:
    """The kernel module for ``name``; "auto" takes triton on a GPU that it supports, aten
    elsewhere, and reference for float64.

    Raises ValueError for an unknown name, or for a kernel that cannot do what is asked, with what
    to do about it.
    """
    if name == "auto":
        if dtype == torch.float64:
            name = "reference"
        elif device.type == "cuda":
            refusal = _refusal("triton", dtype, device, head_dim, v_dim)
            name = "aten" if refusal else "triton"
        else:
            name = "aten"
    elif name not in NAMES:
        raise ValueError(f"kernel={name!r} is unknown; choose one of: auto, {', '.join(NAMES)}")
    elif refusal := _refusal(name, dtype, device, head_dim, v_dim):
        raise ValueError(f"kernel={name!r} {refusal}")
    return _module(name)


def _module(name: str) -> ModuleType:
    """Imported here: a kernel that is not used costs nothing."""
    if name == "triton":
        from ringattn.kernels import triton as module
    elif name == "aten":
        from ringattn.kernels import aten as module
    else:
        from ringattn.kernels import reference as module
    return module


def _refusal(
    name: str, dtype: torch.dtype, device: torch.device, head_dim: int, v_dim: int | None
) -> str | None:
    """Why the kernel cannot do it, or None."""
    try:
        module = _module(name)
    except ModuleNotFoundError as error:
        return f"needs the package {error.name}, which is not installed; use kernel='aten'"
    if not hasattr(module, "refusal"):
        return None
    return module.refusal(dtype, device, head_dim, v_dim or head_dim)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of running states for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def begin(x: torch.Tensor, add: bool) -> torch.Tensor:
    """A running state that goes on from x, or from 0: x itself where it can hold one."""
    if x.dtype == state_dtype(x.dtype):
        return x if add else x.zero_()
    return x.to(torch.float32) if add else torch.zeros_like(x, dtype=torch.float32)


def end(state: torch.Tensor, x: torch.Tensor) -> None:
    """Writes the state to x, unless it is x."""
    if state is not x:
        x.copy_(state)
