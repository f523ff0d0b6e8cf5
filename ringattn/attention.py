"""The executor: walks a plan, overlapping the exchange of step i + 1 with the kernel of step i.

It knows no schedule. The backward walks the same steps with the global log-sum-exp; K/V
gradients travel in float32, one step behind the blocks, and are summed in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ringattn import kernels
from ringattn.comm import Comm, connect
from ringattn.plan import Plan
from ringattn.schedules import Move, Step

Pair = tuple[torch.Tensor, torch.Tensor]  # (k, v) or (dk, dv): [batch, tokens, kv_heads, head_dim]


def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan,
    group: Any = None,
    kernel: str = "auto",
    scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact attention of this rank's queries over the keys of all ranks, differentiable.

    Args:
        q: ``[batch, local tokens, heads, head_dim]``, in the order of ``plan.layout``.
        k, v: ``[batch, local tokens, kv_heads, head_dim]``; kv_heads divides heads.
        plan: from :func:`ringattn.make_plan`; its world is the size of ``group``.
        group: a process group (None: the default one, or a world of one without
            torch.distributed) or a virtual rank of :mod:`ringattn.comm`.
        kernel: "auto", or a name in :data:`ringattn.kernels.KERNELS`.
        scale: of the scores; default ``1 / sqrt(head_dim)``.
        return_lse: also return the log-sum-exp ``[batch, heads, local tokens]``, float32
            (float64 for float64 inputs), natural logarithm; no gradient flows through it.

    Returns: ``[batch, local tokens, heads, v head_dim]`` in the dtype of q. A row without any key
    gives 0, and -inf as its log-sum-exp.

    Raises: ValueError when shapes, dtypes, group and plan do not agree.
    """
    comm = connect(group)
    _check(q, k, v, plan, comm)
    module = kernels.select(kernel, q.dtype)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    out, lse = _RingAttention.apply(q, k, v, plan.steps(comm.rank), comm, module, scale)
    return (out, lse) if return_lse else out


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, steps, comm, kernel, scale):
        k, v = k.contiguous(), v.contiguous()
        dtype = kernels.state_dtype(q.dtype)
        out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=dtype, device=q.device)
        lse_shape = (q.shape[0], q.shape[2], q.shape[1])
        lse = torch.full(lse_shape, -torch.inf, dtype=dtype, device=q.device)
        for step, (held_k, held_v) in _walk(steps, (k, v), comm):
            if step.slices:
                kernel.forward(q, held_k, held_v, step.slices, out, lse, scale)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.run = (steps, comm, kernel, scale)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _):
        grads = _backward(dout, *ctx.saved_tensors, *ctx.run)
        return *grads, None, None, None, None


def _backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    steps: Sequence[Step],
    comm: Comm,
    kernel: ModuleType,
    scale: float,
) -> Pair:
    dq = torch.zeros_like(q, dtype=lse.dtype)
    home: Pair = _zeros((k, v), k.shape[1], lse.dtype)
    arriving: list[tuple[Move, Pair]] = []
    pending = None
    # Half of the work on the own block is kept for the end, to hide the last gradients' way home.
    own = steps[0].slices
    early = own[: len(own) - len(own) // 2] if len(steps) > 1 else own
    for index, (step, held) in enumerate(_walk(steps, (k, v), comm)):
        grads = _zeros(held, step.tokens, lse.dtype) if index else home
        if slices := step.slices if index else early:
            kernel.backward(dout, q, *held, out, lse, slices, dq, *grads, scale)
        if pending:
            pending.wait()
            _add(arriving, grads, home)
        sends = [(x, move.peer) for move in step.grad_sends for x in grads]
        arriving = [(move, _empty(held, move.tokens, lse.dtype)) for move in step.grad_recvs]
        recvs = [(x, move.peer) for move, pair in arriving for x in pair]
        pending = comm.start(sends, recvs, f"K/V gradients, step {index}")
    if late := own[len(early) :]:
        kernel.backward(dout, q, k, v, out, lse, late, dq, *home, scale)
    if pending:
        pending.wait()
        _add(arriving, home, home)
    return dq.to(q.dtype), home[0].to(k.dtype), home[1].to(v.dtype)


def _walk(steps: Sequence[Step], own: Pair, comm: Comm) -> Iterator[tuple[Step, Pair]]:
    """Each step with the block it holds; the next block is on its way meanwhile."""
    held = own
    for index, step in enumerate(steps):
        sends = [(x, move.peer) for move in step.sends for x in held]
        # Where nothing arrives the next step holds an empty block.
        arriving = _empty(own, sum(move.tokens for move in step.recvs), own[0].dtype)
        recvs = [(x, move.peer) for move in step.recvs for x in arriving]
        pending = comm.start(sends, recvs, f"K/V, step {index}")
        yield step, held
        pending.wait()
        held = arriving


def _add(arrived: Sequence[tuple[Move, Pair]], held: Pair, home: Pair) -> None:
    for move, pair in arrived:
        for total, part in zip(home if move.home else held, pair, strict=True):
            total.add_(part)


def _empty(like: Pair, tokens: int, dtype: torch.dtype) -> Pair:
    k, v = (x.new_empty(x.shape[0], tokens, *x.shape[2:], dtype=dtype) for x in like)
    return k, v


def _zeros(like: Pair, tokens: int, dtype: torch.dtype) -> Pair:
    k, v = (x.zero_() for x in _empty(like, tokens, dtype))
    return k, v


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, comm: Comm) -> None:
    if comm.world != plan.world:
        raise ValueError(f"the plan is for {plan.world} ranks, the group has {comm.world}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(
                f"{name} must be [batch, tokens, heads, head_dim], got {list(x.shape)}"
            )
        if x.shape[1] != plan.layout.count(comm.rank):
            raise ValueError(
                f"{name} has {x.shape[1]} tokens, rank {comm.rank} of the plan's layout owns "
                f"{plan.layout.count(comm.rank)}"
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
