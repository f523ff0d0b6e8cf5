"""``ring_attention``, and the operator that it is to autograd and to torch.compile:
``ringattn::attention``, of which they see the shapes and never the exchanges.

Where heads are split over a group of ranks, an all-to-all before and after the executor does so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, overload

import torch
from einops import rearrange
from torch.autograd import forward_ad

from ringattn import kernels
from ringattn.execution.carriers import Comm, check_world, connect, name_of
from ringattn.execution.exchange import gather_heads, scatter_heads
from ringattn.execution.executor import Job, backward, forward
from ringattn.execution.wanted import check_wanted
from ringattn.kernels import Scores
from ringattn.planning.head_split import HeadSplit, check_degree
from ringattn.planning.plan import Plan, numbered


@overload
def ring_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, group: Any = None,
    kernel: str = "auto", scale: float | None = None, return_lse: Literal[False] = False,
    softcap: float | None = None, sinks: torch.Tensor | None = None,
) -> torch.Tensor: ...  # fmt: skip


@overload
def ring_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, group: Any = None,
    kernel: str = "auto", scale: float | None = None, *, return_lse: Literal[True],
    softcap: float | None = None, sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


@overload
def ring_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, group: Any = None,
    kernel: str = "auto", scale: float | None = None, return_lse: bool = False,
    softcap: float | None = None, sinks: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan,
    group: Any = None,
    kernel: str = "auto",
    scale: float | None = None,
    return_lse: bool = False,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact attention of this rank's queries over the keys of all ranks, differentiable.

    Args:
        q: ``[batch, local tokens, heads, head_dim]``, in the order of ``plan.layout``.
        k, v: ``[batch, local tokens, kv_heads, head_dim]``, in the order of ``plan.key_layout``;
            kv_heads divides heads.
        plan: from :func:`ringattn.make_plan`; its world is the size of ``group``. Keep it until
            the backward has run.
        group: a process group (None: the default one, or a world of one without
            torch.distributed) or a virtual rank of :mod:`ringattn.execution.carriers`.
        kernel: "auto", or a name in :data:`ringattn.kernels.NAMES`.
        scale: of the scores, positive; default ``1 / sqrt(head_dim)``.
        return_lse: also return the log-sum-exp ``[batch, heads, local tokens]``, float32
            (float64 for float64 inputs), natural logarithm; no gradient flows through it.
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2).
        sinks: ``[heads]``, alike on every rank: per head the logit of one more key, whose value
            is 0 (gpt-oss); it counts in the log-sum-exp. Its gradient is this rank's share, to be
            summed over ranks as that of any parameter.

    Returns: ``[batch, local tokens, heads, v head_dim]`` in the dtype of q. A row without any key
    gives 0, and as its log-sum-exp -inf, or the sink's logit.

    Raises: ValueError when shapes, dtypes, group and plan do not agree, or the kernel cannot.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    cap = 0.0 if softcap is None else softcap
    options = (name_of(group), kernel, scale, cap, plan.ulysses)
    out, lse, _ = torch.ops.ringattn.attention.default(
        q, k, v, sinks, return_lse, plan.number, *options
    )
    return (out, lse.detach()) if return_lse else out


_library = torch.library.Library("ringattn", "FRAGMENT")
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, bool return_lse, SymInt plan, "
    "str group, str kernel, float scale, float softcap, int ulysses) -> (Tensor, Tensor, Tensor[])"
)
_library.define(
    "attention_backward(Tensor dout, Tensor[] saved, Tensor? sinks, SymInt[] keys, SymInt plan, "
    "str group, str kernel, float scale, float softcap, int ulysses) -> Tensor[]"
)


def _exact(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Without autocast, which would round states that stay in float32."""

    @wraps(operator)
    def inside(x: torch.Tensor, *arguments: Any) -> Any:
        kind = x.device.type
        if not torch.is_autocast_enabled(kind):  # entering a context is not for free
            return operator(x, *arguments)
        with torch.autocast(kind, enabled=False):
            return operator(x, *arguments)

    return inside


@torch.library.impl(_library, "attention", "CompositeExplicitAutograd")
@_exact
def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None,
    return_lse: bool, plan: int, group: str, kernel: str, scale: float, softcap: float,
    ulysses: int,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:  # fmt: skip
    """(out, log-sum-exp, what the backward needs besides). With split heads the latter are q, k,
    v, out and log-sum-exp as this rank has worked on them, flat; the log-sum-exp of all heads is
    then exchanged for return_lse only, and empty otherwise."""
    known, comm = numbered(plan), connect(group)
    if torch.is_inference_mode_enabled():  # which passes autograd by
        check_wanted(comm, q)
    _check(q, k, v, known, comm, scale, softcap, sinks)
    job = Job.make(known, comm, kernel, q, (q.shape[3], v.shape[3]), Scores(scale, softcap))
    split, heads, kv_heads = job.split, q.shape[2], k.shape[2]
    if not split:
        return *forward(q, k, v, sinks, job), []
    on_q, on_k = _sides(split, heads, kv_heads)
    q, k, v = scatter_heads([(q, *on_q), (k, *on_k), (v, *on_k)], split, comm, "heads of q, k, v")
    out, lse = forward(q, k, v, None if sinks is None else _own(sinks, split), job)
    (own,) = gather_heads([(out, *on_q, heads)], split, comm, "heads of out")
    saved = [x.flatten() for x in (q, k, v, out, lse)]
    if not return_lse:
        return own, lse.new_empty(0), saved
    of_heads = [(rearrange(lse, "b h q -> b q h 1"), *on_q, heads)]
    (rows,) = gather_heads(of_heads, split, comm, "heads of the log-sum-exp")
    return own, rearrange(rows, "b q h 1 -> b h q").contiguous(), saved


@torch.library.register_fake("ringattn::attention", lib=_library)
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None,
    return_lse: bool, plan: int, group: str, kernel: str, scale: float, softcap: float,
    ulysses: int,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:  # fmt: skip
    out = q.new_empty(*q.shape[:3], v.shape[3])
    whole = return_lse or ulysses == 1
    shape = [q.shape[0], q.shape[2], q.shape[1]] if whole else [0]
    lse = q.new_empty(shape, dtype=kernels.state_dtype(q.dtype))
    if ulysses == 1:
        return out, lse, []
    size = torch.library.get_ctx().new_dynamic_size
    return out, lse, [x.new_empty(size()) for x in (q, k, v, out, lse)]


@torch.library.impl(_library, "attention_backward", "CompositeExplicitAutograd")
@_exact
def _attention_backward(
    dout: torch.Tensor, saved: list[torch.Tensor], sinks: torch.Tensor | None, keys: list[int],
    plan: int, group: str, kernel: str, scale: float, softcap: float, ulysses: int,
) -> list[torch.Tensor]:  # fmt: skip
    """[dq, dk, dv], and dsinks if there are sinks. ``keys``: tokens, heads and head_dim of k."""
    known, comm = numbered(plan), connect(group)
    scores = Scores(scale, softcap)
    job = Job.make(known, comm, kernel, dout, (keys[2], dout.shape[3]), scores)
    split, heads, kv_heads, dtype = job.split, dout.shape[2], keys[1], dout.dtype
    if split:
        on_q, on_k = _sides(split, heads, kv_heads)
        (dout,) = scatter_heads([(dout, *on_q)], split, comm, "heads of the gradient")
        saved = _shaped(saved, dout, len(on_k[1][split.member]), keys[2])
    q, k, v, out, lse = saved
    dsinks = [] if sinks is None else [_sinks_grad(dout, out, lse, sinks, split)]
    dq, dk, dv = backward(dout, q, k, v, out, lse, job)
    if not split:
        return [dq, dk.to(dtype), dv.to(dtype), *dsinks]
    if not split.replicates(heads, kv_heads):
        # Nothing is summed on the way, so rounding first changes nothing but the bytes.
        dk, dv = dk.to(dtype), dv.to(dtype)
    back = [(dq, *on_q, heads), (dk, *on_k, kv_heads), (dv, *on_k, kv_heads)]
    dq, dk, dv = gather_heads(back, split, comm, "heads of dq, dk, dv")
    return [dq, dk.to(dtype), dv.to(dtype), *dsinks]


@torch.library.register_fake("ringattn::attention_backward", lib=_library)
def _(
    dout: torch.Tensor, saved: list[torch.Tensor], sinks: torch.Tensor | None, keys: list[int],
    plan: int, group: str, kernel: str, scale: float, softcap: float, ulysses: int,
) -> list[torch.Tensor]:  # fmt: skip
    tokens, heads, dim = keys
    batch, v_dim = dout.shape[0], dout.shape[3]
    of_k = ((batch, tokens, heads, dim), (batch, tokens, heads, v_dim))
    shapes = ((*dout.shape[:3], dim), *of_k)
    dsinks = [] if sinks is None else [torch.empty_like(sinks)]
    return [dout.new_empty(shape) for shape in shapes] + dsinks


# Autograd is registered by hand: torch.library.register_autograd takes lists of tensors apart in
# Python, 60 us a call.
class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keys: Any, *inputs: Any) -> tuple[torch.Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse, saved = torch.ops.ringattn.attention.default.redispatch(keys, *inputs)
        q, k, v, sinks, _, *ctx.options = inputs
        ctx.keys, ctx.sinks = list(k.shape[1:]), sinks is not None
        ctx.save_for_backward(*(saved or (q, k, v, out, lse)), *([sinks] if ctx.sinks else []))
        ctx.set_materialize_grads(False)
        number, group = ctx.options[:2]
        # Held until the backward; a compiled graph holds neither and relies on the caller.
        ctx.alive = (numbered(number), connect(group)) if isinstance(number, int) else None
        return out, lse, *saved

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
        none = (None,) * (1 + len(ctx.options))
        if dout is None:
            return None, None, None, None, None, *none
        saved = list(ctx.saved_tensors)
        sinks = saved.pop() if ctx.sinks else None
        operator = torch.ops.ringattn.attention_backward.default
        grads = operator(dout, saved, sinks, ctx.keys, *ctx.options)
        return None, *grads, *([] if ctx.sinks else [None]), *none


class _Once(torch.autograd.Function):
    """The first derivative, which has none itself."""

    @staticmethod
    def forward(
        ctx: Any, keys: Any, count: int, dout: torch.Tensor, *inputs: Any
    ) -> tuple[torch.Tensor, ...]:
        operator = torch.ops.ringattn.attention_backward.default
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(operator.redispatch(keys, dout, inputs[:count], *inputs[count:]))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("ring_attention has no second derivative")


def _wanted(*tensors: torch.Tensor | None) -> bool:
    """Whether somebody wants the derivative. A forward-mode one would be 0 without a word."""
    if forward_ad._current_level >= 0 and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors
    ):
        raise RuntimeError("ring_attention has no forward-mode derivative; use the backward")
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _differentiably(keys: Any, *inputs: Any) -> Any:
    below = keys & torch._C._after_autograd_keyset
    check_wanted(inputs[6], *inputs[:4])
    if _wanted(*inputs[:4]):
        out, lse, *saved = _Differentiable.apply(below, *inputs)
        return out, lse, saved
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.ringattn.attention.default.redispatch(below, *inputs)


def _once(
    keys: Any, dout: torch.Tensor, saved: list[torch.Tensor], sinks: Any, *options: Any
) -> Any:
    below = keys & torch._C._after_autograd_keyset
    if _wanted(dout, *saved, sinks):
        return list(_Once.apply(below, len(saved), dout, *saved, sinks, *options))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.ringattn.attention_backward.default.redispatch(
            below, dout, saved, sinks, *options
        )


_library.impl("attention", _differentiably, "Autograd", with_keyset=True)
_library.impl("attention_backward", _once, "Autograd", with_keyset=True)


def _own(sinks: torch.Tensor, split: HeadSplit | None) -> torch.Tensor:
    """The sinks of the heads that this rank computes."""
    if split is None:
        return sinks
    heads = split.q_heads(split.member, sinks.shape[0])
    return sinks[heads.start : heads.stop]


def _sinks_grad(
    dout: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    sinks: torch.Tensor,
    split: HeadSplit | None,
) -> torch.Tensor:
    """``[heads]``, 0 for heads of other ranks: a sink's weight times what its value, 0, is below
    the output."""
    delta = rearrange((dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1), "b q h -> b h q")
    own = _own(sinks, split)
    weights = torch.exp(own.to(lse.dtype)[:, None] - lse.masked_fill(lse == -torch.inf, torch.inf))
    whole = torch.zeros_like(sinks)
    _own(whole, split).copy_(-(weights * delta).sum((0, 2)))
    return whole


def _shaped(
    saved: list[torch.Tensor], dout: torch.Tensor, kv_heads: int, dim: int
) -> list[torch.Tensor]:
    """What the forward has saved flat, in its shapes; dout is ``[batch, rows, heads, v_dim]``."""
    (batch, rows, heads, v_dim), keys = dout.shape, (dout.shape[0], -1, kv_heads)
    shapes = (
        (batch, rows, heads, dim),
        (*keys, dim),
        (*keys, v_dim),
        (batch, rows, heads, v_dim),
        (batch, heads, rows),
    )
    return [x.view(shape) for x, shape in zip(saved, shapes, strict=True)]


def _sides(split: HeadSplit, heads: int, kv_heads: int) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """(rows, heads) of every member, for queries and for keys."""
    members = range(split.degree)
    return (
        (split.q_rows, [split.q_heads(m, heads) for m in members]),
        (split.k_rows, [split.kv_heads(m, heads, kv_heads) for m in members]),
    )


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan,
    comm: Comm,
    scale: float,
    softcap: float,
    sinks: torch.Tensor | None,
) -> None:
    check_world(comm, plan.world)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(
                f"{name} must be [batch, tokens, heads, head_dim], got {list(x.shape)}"
            )
        layout, whose = (plan.layout, "") if name == "q" else (plan.key_layout, "key ")
        if x.shape[1] != layout.count(comm.rank):
            raise ValueError(
                f"{name} has {x.shape[1]} tokens, rank {comm.rank} of the plan's {whose}layout "
                f"owns {layout.count(comm.rank)}"
            )
        if x.dtype != q.dtype or x.device != q.device or x.shape[0] != q.shape[0]:
            raise ValueError(
                f"q, k, v must share batch, dtype and device; q is {list(q.shape)} {q.dtype} on "
                f"{q.device}, {name} is {list(x.shape)} {x.dtype} on {x.device}"
            )
    if not q.is_floating_point():
        raise ValueError(f"q must be a floating-point tensor, got {q.dtype}")
    if k.shape[2] != v.shape[2] or k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"k and v need equal numbers of heads that divide q's {q.shape[2]}; "
            f"got {k.shape[2]} and {v.shape[2]}"
        )
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k need one head_dim, got {q.shape[3]} and {k.shape[3]}")
    check_degree(plan.ulysses, plan.world, q.shape[2])
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}; negate q instead")
    if softcap < 0 or not math.isfinite(softcap):
        raise ValueError(f"softcap must be positive and finite (None: no cap), got {softcap}")
    if sinks is not None and (sinks.shape != q.shape[2:3] or not sinks.is_floating_point()):
        raise ValueError(
            f"sinks must be one floating-point logit per head, [{q.shape[2]}], "
            f"got {list(sinks.shape)} {sinks.dtype}"
        )
