"""Block kernels: attention of local queries over one held block of keys, for a list of bands.

A kernel is what :class:`Kernel` says: here, each is a module of this package. Tensors are ``[batch,
tokens, heads, head_dim]`` (K/V may have fewer heads: head h reads K/V head
``h // (heads // kv_heads)``), log-sum-exp is ``[batch, heads, tokens]``; bands index the tokens of
q and of k, and the list is never empty. Running states are float32 (float64 for float64 inputs)
between all steps.

How to write one: docs/kernels.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from ringattn.planning.slices import Band

if TYPE_CHECKING:  # the names are known without torch
    import torch

# The kernels by name; each is a module of this package, imported when it is first used.
NAMES = ("gluon", "triton", "aten", "reference")


@dataclass(frozen=True)
class Scores:
    """How products become scores: ``sm_scale * q.k``, or ``softcap * tanh(sm_scale * q.k /
    softcap)`` with a softcap above 0."""

    sm_scale: float
    softcap: float = 0.0


class Kernel(Protocol):
    """What a block kernel is.

    ``q``, ``k``, ``v``, the output's gradient ``dout`` and ``scores`` are those of the step; shapes
    are the module's. ``dtype``, ``device``, ``head_dim`` and ``v_dim`` are of what it would be
    given.

    A forward is one ``forward`` per step. A backward is ``prepare``, one ``backward`` per step, and
    ``finish``; all steps share the final out and log-sum-exp, so the steps need no order.
    """

    def refusal(
        self, dtype: torch.dtype, device: torch.device, head_dim: int, v_dim: int
    ) -> str | None:
        """Why the kernel cannot do it, and what to do instead; None if it can."""

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bands: Sequence[Band],
        partial: torch.Tensor | None,
        out: torch.Tensor,
        lse: torch.Tensor,
        scores: Scores,
    ) -> None:
        """Merges the attention over ``bands`` into the running state.

        Args:
            partial: the output of the steps before, in float32; None: nothing yet. May be
                overwritten.
            out: where the result goes, all rows of it: ``partial`` itself, a new state, or the
                final output in the dtype of q.
            lse: updated in place, natural logarithm. Where it begins above -inf, as at the logit of
                an attention sink, that much weight is already spent on an output of 0.
        """

    def prepare(self, dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> Any:
        """What ``backward`` needs to know of the final, global out and lse."""

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        prepared: Any,
        bands: Sequence[Band],
        dq: torch.Tensor,
        dk: torch.Tensor,
        dv: torch.Tensor,
        scores: Scores,
        add_q: bool,
        add_k: bool,
    ) -> None:
        """Adds to ``dq`` and to ``dk``, ``dv``, in place.

        Args:
            prepared: of ``prepare``.
            dq: dense and in float32, in a measure of the kernel's own until ``finish``.
            dk, dv: float32, or without ``add_k`` also the dtype of q.
            add_q, add_k: False: they hold nothing yet, and all of them is written.
        """

    def finish(self, dq: torch.Tensor, dtype: torch.dtype, scores: Scores) -> torch.Tensor:
        """The gradient of q in ``dtype``, once all steps have added to ``dq``, which may be
        overwritten."""


def select(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    head_dim: int,
    v_dim: int | None = None,
) -> Kernel:
    """The kernel for ``name``, for inputs of this ``dtype``, ``device``, ``head_dim`` and ``v_dim``
    of v (None: the same); "auto" takes gluon or triton on a GPU that they support, in this order,
    aten elsewhere, and reference for float64.

    Raises ValueError for an unknown name, or for a kernel that cannot do what is asked, with what
    to do about it.
    """
    if name == "auto":
        if dtype.is_floating_point and dtype.itemsize == 8:
            name = "reference"
        elif device.type == "cuda":
            able = (
                n for n in ("gluon", "triton") if not _refusal(n, dtype, device, head_dim, v_dim)
            )
            name = next(able, "aten")
        else:
            name = "aten"
    elif name not in NAMES:
        raise ValueError(f"kernel={name!r} is unknown; choose one of: auto, {', '.join(NAMES)}")
    elif refusal := _refusal(name, dtype, device, head_dim, v_dim):
        raise ValueError(f"kernel={name!r} {refusal}")
    return _module(name)


def _module(name: str) -> Kernel:
    """Imported here: a kernel that is not used costs nothing."""
    return import_module(f"ringattn.kernels.{name}")


def _refusal(
    name: str, dtype: torch.dtype, device: torch.device, head_dim: int, v_dim: int | None
) -> str | None:
    """Why the kernel cannot do it, or None."""
    try:
        module = _module(name)
    except ModuleNotFoundError as error:
        return f"needs the package {error.name}, which is not installed; use kernel='aten'"
    return module.refusal(dtype, device, head_dim, v_dim or head_dim)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of running states for inputs of ``dtype``."""
    import torch

    return torch.float64 if dtype == torch.float64 else torch.float32


def begin(x: torch.Tensor, add: bool) -> torch.Tensor:
    """A running state that goes on from ``x`` (``add``), or from 0: x itself where it can hold
    one."""
    state = state_dtype(x.dtype)
    if x.dtype == state:
        return x if add else x.zero_()
    if add:
        return x.to(state)
    import torch

    return torch.zeros_like(x, dtype=state)


def end(state: torch.Tensor, x: torch.Tensor) -> None:
    """Writes the state to x, unless it is x."""
    if state is not x:
        x.copy_(state)
