"""Block kernels: attention of local queries over one held block of keys, for a list of bands.

Every kernel is a module with two functions. Tensors are ``[batch, tokens, heads, head_dim]``
(K/V may have fewer heads: head h reads K/V head ``h // (heads // kv_heads)``), log-sum-exp is
``[batch, heads, tokens]``; bands index the tokens of q and of k.

The list of bands is never empty.

``forward(q, k, v, bands, out, lse, scale)``
    merges the attention over ``bands`` into the running ``(out, lse)``, in place. ``out`` starts
    at 0 and ``lse`` at -inf; both are float32 (float64 for float64 inputs) between all steps.
``backward(dout, q, k, v, out, lse, bands, dq, dk, dv, scale)``
    takes the final, global ``(out, lse)`` and adds into ``dq``, ``dk``, ``dv``, in place.
"""

from types import ModuleType

import torch
from ringattn.kernels import aten, reference

KERNELS = {"aten": aten, "reference": reference}


def select(name: str, dtype: torch.dtype) -> ModuleType:
    """The kernel module for ``name``; "auto" takes aten, and reference for float64.

    Raises ValueError for an unknown name.
    """
    if name == "auto":
        return reference if dtype == torch.float64 else aten
    if name not in KERNELS:
        raise ValueError(f"kernel={name!r} is unknown; choose one of: auto, {', '.join(KERNELS)}")
    return KERNELS[name]


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of partial states for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32
