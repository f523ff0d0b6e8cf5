"""The executor: walks a plan, overlapping the exchange of step i + 1 with the kernel of step i.

It knows no schedule. The backward walks the same steps with the global log-sum-exp; K/V gradients
travel in float32, one step behind the blocks, and are summed in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from ringattn import kernels
from ringattn.execution.carriers import Comm
from ringattn.execution.exchange import Inbox, add, take
from ringattn.kernels import Kernel, Scores
from ringattn.planning.head_split import HeadSplit
from ringattn.planning.plan import Plan
from ringattn.planning.schedules import RankPlan, Step
from ringattn.planning.slices import Bands

Pair = tuple[torch.Tensor, torch.Tensor]  # (k, v) or (dk, dv): [batch, tokens, kv_heads, head_dim]


@dataclass(frozen=True)
class Job:
    """One call: what to do on this rank, and with what."""

    plan: RankPlan
    split: HeadSplit | None
    comm: Comm
    kernel: Kernel
    scores: Scores

    @classmethod
    def make(
        cls,
        plan: Plan,
        comm: Comm,
        kernel: str,
        x: torch.Tensor,
        dims: tuple[int, int],
        scores: Scores,
    ) -> Job:
        """x has the dtype and the device; ``dims``: head_dim of q and of v."""
        chosen = kernels.select(kernel, x.dtype, x.device, *dims)
        return cls(plan.rank(comm.rank), plan.heads(comm.rank), comm, chosen, scores)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    job: Job,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out in ``out_dtype``, by default that of q; lse) of the queries that this rank works on."""
    dtype, out_dtype = kernels.state_dtype(q.dtype), out_dtype or q.dtype
    shape = (*q.shape[:3], v.shape[-1])
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=dtype)
    if sinks is not None:
        lse.copy_(sinks.to(dtype)[:, None].expand_as(lse))
    last = max((i for i, step in enumerate(job.plan.steps) if step.bands), default=None)
    out = None
    for index, step, kv in _walk((k, v), job):
        if step.bands:
            # The last step writes what is returned, the others the running state.
            before, wanted = out, out_dtype if index == last else dtype
            if before is None or before.dtype != wanted:
                out = q.new_empty(shape, dtype=wanted)
            with _named(f"forward, step {index}: block {step.block}"):
                job.kernel.forward(
                    q=q,
                    k=kv[0],
                    v=kv[1],
                    bands=step.bands,
                    partial=before,
                    out=out,
                    lse=lse,
                    scores=job.scores,
                )
            del before
        del kv  # or it would live on beside the next two
    return q.new_zeros(shape, dtype=out_dtype) if out is None else out, lse


class _Grads:
    """The gradients of the K/V blocks that this rank has a part in, float32 unless nothing is ever
    added to them; written when first touched, so that no kernel reads zeros."""

    def __init__(self, like: Pair, blocks: tuple[int, ...], dtype: torch.dtype) -> None:
        self.like, self.blocks, self.dtype = like, blocks, dtype
        self.pairs: dict[int, Pair] = {}
        self.begun: set[int] = set()

    def pair(self, block: int) -> Pair:
        """To be written if the block is not yet in ``begun``, and added to if it is."""
        if block not in self.pairs:
            self.pairs[block] = _empty(self.like, self.blocks[block], self.dtype)
        return self.pairs[block]

    def sums(self, block: int) -> Pair:
        """To be read or added to: 0 where nothing has been written."""
        pair = self.pair(block)
        if block not in self.begun:
            self.begun.add(block)
            for x in pair:
                x.zero_()
        return pair


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    job: Job,
    dq_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq in ``dq_dtype``, by default that of q; dk, dv in that of lse, or of q where a single step
    computes all."""
    dq_dtype = dq_dtype or q.dtype
    steps, kernel = job.plan.steps, job.kernel
    alone = len(steps) == 1 and not steps[0].grad_sends and not steps[0].grad_recvs
    # Shares of split heads may have to be summed yet.
    dtype = q.dtype if alone and not job.split else lse.dtype
    dq = torch.empty_like(q, dtype=lse.dtype, memory_format=torch.contiguous_format)
    grads = _Grads((k, v), job.plan.blocks, dtype)
    prepared = kernel.prepare(dout, out, lse)
    begun = False

    def compute(kv: Pair, block: int, bands: Bands) -> None:
        nonlocal begun
        dk, dv = grads.pair(block)
        kernel.backward(
            dout=dout,
            q=q,
            k=kv[0],
            v=kv[1],
            prepared=prepared,
            bands=bands,
            dq=dq,
            dk=dk,
            dv=dv,
            scores=job.scores,
            add_q=begun,
            add_k=block in grads.begun,
        )
        grads.begun.add(block)
        begun = True

    # Half of the work on the own block is kept for the end, to hide the last gradients' way home.
    early, late = steps[0].bands.halves if len(steps) > 1 else (steps[0].bands, ())

    def begin(step: Step, index: int) -> Callable[[], None]:
        """Starts the gradients on their way; what is returned waits and adds those that came."""
        sends = [(take(x, m.rows), m.peer) for m in step.grad_sends for x in grads.sums(m.block)]
        arriving = [(m, _empty((k, v), m.tokens, lse.dtype)) for m in step.grad_recvs]
        recvs = [(x, move.peer) for move, pair in arriving for x in pair]
        pending = job.comm.start(sends, recvs, f"K/V gradients, step {index}")

        def finish() -> None:
            pending.wait()
            for move, pair in arriving:
                for total, part in zip(grads.sums(move.block), pair, strict=True):
                    add(total, move.rows, part)

        return finish

    finish = None
    for index, step, kv in _walk((k, v), job):
        if bands := step.bands if index else early:
            with _named(f"backward, step {index}: block {step.block}"):
                compute(kv, step.block, bands)
        del kv
        if finish:
            with _named(f"wait for K/V gradients, step {index - 1}"):
                finish()
            del finish  # with its buffers, before the next ones are made
        finish = begin(step, index)
        for block in job.plan.grads_done(index):
            grads.pairs.pop(block, None)
    if late:
        with _named("backward, rest of step 0"):
            compute((k, v), 0, late)
    with _named("wait for the last K/V gradients"):
        finish()
    if not begun:
        return torch.zeros_like(q, dtype=dq_dtype), *grads.sums(0)
    return kernel.finish(dq, dq_dtype, job.scores), *grads.sums(0)


def _walk(own: Pair, job: Job) -> Iterator[tuple[int, Step, Pair]]:
    """Each step, numbered, with the block it computes on; its moves are on their way meanwhile."""
    blocks = {0: own}

    def begin(step: Step, index: int) -> Callable[[], None]:
        """Starts the moves of a step; what is returned waits for them."""
        sends = [(take(x, m.rows), m.peer) for m in step.sends for x in blocks[m.block]]
        inbox = Inbox()
        for move in step.recvs:
            if move.block not in blocks:
                blocks[move.block] = _empty(own, job.plan.blocks[move.block], own[0].dtype)
            for x in blocks[move.block]:
                inbox.into(move.peer, x, move.rows)
        pending = job.comm.start(sends, inbox.messages, f"K/V, step {index}")

        def finish() -> None:
            pending.wait()
            inbox.unpack()

        return finish

    for index, step in enumerate(job.plan.steps):
        finish = begin(step, index)
        yield index, step, blocks.get(step.block, own)
        with _named(f"wait for K/V, step {index}"):
            finish()
        del finish  # with its buffers, before the next ones are made
        for block in job.plan.blocks_done(index):
            blocks.pop(block, None)


def _named(label: str) -> AbstractContextManager:
    """A name in the profiler's trace; nothing where none is being written."""
    if torch.autograd._profiler_enabled():
        return torch.profiler.record_function(label)
    return nullcontext()


def _empty(like: Pair, tokens: int, dtype: torch.dtype) -> Pair:
    k, v = (x.new_empty(x.shape[0], tokens, *x.shape[2:], dtype=dtype) for x in like)
    return k, v
