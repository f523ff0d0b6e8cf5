"""The executor: walks a plan, overlapping the exchange of step i + 1 with the kernel of step i.

It knows no schedule. The backward walks the same steps with the global log-sum-exp; K/V gradients
travel in float32, one step behind the blocks, and are summed in a fixed order. Where heads are
split over a group of ranks, an all-to-all before and after does so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from einops import rearrange
from torch.autograd.function import once_differentiable

from ringattn import kernels
from ringattn.comm import Comm, connect
from ringattn.exchange import Inbox, add, gather_heads, scatter_heads, take
from ringattn.heads import HeadSplit, check_degree
from ringattn.plan import Plan
from ringattn.schedules import RankPlan, Step

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
        k, v: ``[batch, local tokens, kv_heads, head_dim]``, in the order of ``plan.key_layout``;
            kv_heads divides heads.
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
    run = _Run(plan.rank(comm.rank), plan.heads(comm.rank), comm, module, scale, return_lse)
    out, lse = _RingAttention.apply(q, k, v, run)
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class _Run:
    """One call: what to do on this rank, and with what."""

    plan: RankPlan
    split: HeadSplit | None
    comm: Comm
    kernel: ModuleType
    scale: float
    return_lse: bool


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, run):
        heads, kv_heads = q.shape[2], k.shape[2]
        if run.split:
            on_q, on_k = _sides(run.split, heads, kv_heads)
            q, k, v = scatter_heads(
                [(q, *on_q), (k, *on_k), (v, *on_k)], run.split, run.comm, "heads of q, k, v"
            )
        out, lse = _forward(q, k, v, run)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.run, ctx.heads = run, (heads, kv_heads)
        if run.split:
            (out,) = gather_heads([(out, *on_q, heads)], run.split, run.comm, "heads of out")
            if run.return_lse:
                whole = [(rearrange(lse, "b h q -> b q h 1"), *on_q, heads)]
                (whole,) = gather_heads(whole, run.split, run.comm, "heads of the log-sum-exp")
                lse = rearrange(whole, "b q h 1 -> b h q")
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _):
        run, (heads, kv_heads) = ctx.run, ctx.heads
        q, k, v, out, lse = ctx.saved_tensors
        if not run.split:
            dq, dk, dv = _backward(dout, q, k, v, out, lse, run)
            return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None
        on_q, on_k = _sides(run.split, heads, kv_heads)
        (dout,) = scatter_heads([(dout, *on_q)], run.split, run.comm, "heads of the gradient")
        dq, dk, dv = _backward(dout, q, k, v, out, lse, run)
        if not run.split.replicates(heads, kv_heads):
            # Nothing is summed on the way, so rounding first changes nothing but the bytes.
            dk, dv = dk.to(k.dtype), dv.to(v.dtype)
        back = [(dq.to(q.dtype), *on_q, heads), (dk, *on_k, kv_heads), (dv, *on_k, kv_heads)]
        dq, dk, dv = gather_heads(back, run.split, run.comm, "heads of dq, dk, dv")
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


def _sides(split: HeadSplit, heads: int, kv_heads: int) -> tuple[tuple, tuple]:
    """(rows, heads) of every member, for queries and for keys."""
    members = range(split.degree)
    return (
        (split.q_rows, [split.q_heads(m, heads) for m in members]),
        (split.k_rows, [split.kv_heads(m, heads, kv_heads) for m in members]),
    )


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, run: _Run
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out in the dtype of q, lse) of the queries that this rank works on."""
    dtype = kernels.state_dtype(q.dtype)
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=dtype, device=q.device)
    lse_shape = (q.shape[0], q.shape[2], q.shape[1])
    lse = torch.full(lse_shape, -torch.inf, dtype=dtype, device=q.device)
    for step, held in _walk((k, v), run):
        if step.bands:
            run.kernel.forward(q, *held, step.bands, out, lse, run.scale)
        del held  # or it would live on beside the next two
    return out.to(q.dtype), lse


def _backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    run: _Run,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) in the dtype of lse."""
    steps, kernel = run.plan.steps, run.kernel
    dq = torch.zeros_like(q, dtype=lse.dtype)
    grads: dict[int, Pair] = {}

    def grad(block: int) -> Pair:
        if block not in grads:
            grads[block] = _zeros((k, v), run.plan.blocks[block], lse.dtype)
        return grads[block]

    home = grad(0)
    # Half of the work on the own block is kept for the end, to hide the last gradients' way home.
    own = steps[0].bands
    early = own[: len(own) - len(own) // 2] if len(steps) > 1 else own

    def begin(step: Step, index: int) -> Callable[[], None]:
        """Starts the gradients on their way; what is returned waits and adds those that came."""
        sends = [(take(x, m.rows), m.peer) for m in step.grad_sends for x in grad(m.block)]
        arriving = [(m, _empty((k, v), m.tokens, lse.dtype)) for m in step.grad_recvs]
        recvs = [(x, move.peer) for move, pair in arriving for x in pair]
        pending = run.comm.start(sends, recvs, f"K/V gradients, step {index}")

        def finish() -> None:
            pending.wait()
            for move, pair in arriving:
                for total, part in zip(grad(move.block), pair, strict=True):
                    add(total, move.rows, part)

        return finish

    finish = None
    for index, (step, held) in enumerate(_walk((k, v), run)):
        if bands := step.bands if index else early:
            kernel.backward(dout, q, *held, out, lse, bands, dq, *grad(step.block), run.scale)
        del held
        if finish:
            finish()
            del finish  # with its buffers, before the next ones are made
        finish = begin(step, index)
        for block in run.plan.grads_done(index):
            grads.pop(block, None)
    if late := own[len(early) :]:
        kernel.backward(dout, q, k, v, out, lse, late, dq, *home, run.scale)
    finish()
    return dq, *home


def _walk(own: Pair, run: _Run) -> Iterator[tuple[Step, Pair]]:
    """Each step with the block it computes on; its moves are on their way meanwhile."""
    own = (own[0].contiguous(), own[1].contiguous())
    blocks = {0: own}

    def begin(step: Step, index: int) -> Callable[[], None]:
        """Starts the moves of a step; what is returned waits for them."""
        sends = [(take(x, m.rows), m.peer) for m in step.sends for x in blocks[m.block]]
        inbox = Inbox()
        for move in step.recvs:
            if move.block not in blocks:
                blocks[move.block] = _empty(own, run.plan.blocks[move.block], own[0].dtype)
            for x in blocks[move.block]:
                inbox.into(move.peer, x, move.rows)
        pending = run.comm.start(sends, inbox.messages, f"K/V, step {index}")

        def finish() -> None:
            pending.wait()
            inbox.unpack()

        return finish

    for index, step in enumerate(run.plan.steps):
        finish = begin(step, index)
        yield step, blocks.get(step.block, own)
        finish()
        del finish  # with its buffers, before the next ones are made
        for block in run.plan.blocks_done(index):
            blocks.pop(block, None)


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
