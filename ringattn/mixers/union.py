"""One softmax over several sets of keys, each with a plan of its own.

Forward: the attention over each set gives (out, log-sum-exp), which are merged as the steps of a
ring are. Backward: each set's backward is given the merged out and log-sum-exp, so it knows nothing
of the others. Neither the executor nor a kernel has to know of unions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from einops import rearrange

from ringattn import kernels
from ringattn.execution.carriers import Comm, check_world, connect
from ringattn.execution.executor import Job, backward, forward
from ringattn.execution.wanted import check_wanted
from ringattn.kernels import Scores
from ringattn.mixers.heads import Shared
from ringattn.planning.plan import Plan


class Rows:
    """Which rows of q a part takes, each as often as it likes: ``index`` int64 ``[rows]`` into the
    rows of ``[batch, shared, tokens]``, flat, where ``shared`` groups of ``heads / shared`` heads
    each choose for themselves. To the part they are the queries ``[1, rows, heads / shared,
    head_dim]``."""

    def __init__(self, index: torch.Tensor, shared: int) -> None:
        self.index, self.shared = index, shared
        self._taken: torch.Tensor | None = None

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """Of ``x`` ``[batch, tokens, heads, dim]``: ``[1, rows, heads / shared, dim]``."""
        return rearrange(x, "b t (s g) d -> (b s t) g d", s=self.shared)[self.index][None]

    def take_lse(self, lse: torch.Tensor) -> torch.Tensor:
        """Of ``lse`` ``[batch, heads, tokens]``: ``[1, heads / shared, rows]``."""
        flat = rearrange(lse, "b (s g) t -> (b s t) g", s=self.shared)
        return flat[self.index].mT[None]

    def turns(self, x: torch.Tensor, lse: torch.Tensor, like: torch.Tensor) -> Any:
        """What the part has for the rows of ``like`` ``[batch, tokens, heads, dim]``: as many pairs
        of its form, of x and lse, as a row is taken at most; -inf where it is not taken so often.
        """
        batch, tokens = like.shape[:2]
        flat = torch.cat([x[0], x.new_zeros(1, *x.shape[2:])])
        flat_lse = torch.cat([lse[0].mT, lse.new_full((1, lse.shape[1]), -torch.inf)])
        sizes = {"b": batch, "s": self.shared, "t": tokens}
        for at in self._inverse(batch * self.shared * tokens).unbind(1):
            yield (
                rearrange(flat[at], "(b s t) g d -> b t (s g) d", **sizes),
                rearrange(flat_lse[at], "(b s t) g -> b (s g) t", **sizes),
            )

    def summed(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`take`, from ``x`` to the rows of ``like``: what was taken several
        times is summed."""
        total = torch.zeros_like(like, dtype=x.dtype)
        lse = x.new_zeros(1, x.shape[2], x.shape[1])
        for part, _ in self.turns(x, lse, like):
            total += part
        return total

    def _inverse(self, rows: int) -> torch.Tensor:
        """``[rows, times]``: where each row was taken; one past the end where it was not. In a
        fixed order, so that sums are bitwise the same, which index_add on a GPU is not."""
        if not len(self.index):
            return self.index.new_empty(rows, 0)
        if self._taken is None:
            order = torch.argsort(self.index, stable=True)
            taken = self.index[order]
            counts = torch.bincount(taken, minlength=rows)
            first = torch.cumsum(counts, 0) - counts
            place = torch.arange(len(order), device=order.device) - first[taken]
            inverse = self.index.new_full((rows, int(counts.max())), len(self.index))
            inverse[taken, place] = order
            self._taken = inverse
        return self._taken


@dataclass(frozen=True)
class Part:
    """A set of keys: ``k``, ``v`` ``[batch, local rows, kv_heads, dim]`` in the order of the plan's
    key layout. Each key counts ``exp(log_weight)`` times: a number, or ``[heads]`` (of which there
    is no gradient). ``rows``: the rows of q whose keys these are, in the order of the plan's
    layout, with k and v ``[1, rows, 1, dim]``; None: all."""

    k: torch.Tensor
    v: torch.Tensor
    plan: Plan
    log_weight: float | torch.Tensor = 0.0
    rows: Rows | None = None


@dataclass(frozen=True)
class State:
    """What something else than softmax attention has for the same queries: ``out`` ``[batch,
    tokens, heads, v_dim]`` over a normaliser whose logarithm is ``lse`` ``[batch, heads, tokens]``;
    both with gradients. ``weight``: a number or ``[heads]``, at least 0, how often it counts; of it
    there is a gradient too."""

    out: torch.Tensor
    lse: torch.Tensor
    weight: float | torch.Tensor = 1.0


@overload
def union(
    q: torch.Tensor, parts: Sequence[Part], group: Any = None, kernel: str = "auto",
    scale: float | None = None, return_lse: Literal[False] = False,
    softcap: float | None = None, sinks: torch.Tensor | None = None,
) -> torch.Tensor: ...  # fmt: skip


@overload
def union(
    q: torch.Tensor, parts: Sequence[Part], group: Any = None, kernel: str = "auto",
    scale: float | None = None, *, return_lse: Literal[True],
    softcap: float | None = None, sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


@overload
def union(
    q: torch.Tensor, parts: Sequence[Part], group: Any = None,
    kernel: str = "auto", scale: float | None = None, return_lse: bool = False,
    softcap: float | None = None, sinks: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


def union(
    q: torch.Tensor,
    parts: Sequence[Part],
    group: Any = None,
    kernel: str = "auto",
    scale: float | None = None,
    return_lse: bool = False,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of this rank's queries over all keys of all ``parts``; a key that is in
    several counts several times. Differentiable.

    q ``[batch, local tokens, heads, head_dim]``; all other arguments, what is returned and what is
    raised are as of :func:`ringattn.ring_attention`. All plans are of one layout (but those of
    parts with ``rows``) and one degree of ulysses (parts with ``rows``: 1). ``sinks`` count once.
    Collective over ``group``.

    >>> near = Part(k, v, ringattn.make_plan(masks.sliding_window(n, 512), layout))
    >>> far = Part(k_mean, v_mean, plan_over_means, log_weight=math.log(64))
    >>> out = union(q, [near, far], group)
    """
    return combine(q, parts, (), group, kernel, scale, return_lse, softcap, sinks)


@overload
def combine(
    q: torch.Tensor, parts: Sequence[Part], states: Sequence[State], group: Any = None,
    kernel: str = "auto", scale: float | None = None, return_lse: Literal[False] = False,
    softcap: float | None = None, sinks: torch.Tensor | None = None,
) -> torch.Tensor: ...  # fmt: skip


@overload
def combine(
    q: torch.Tensor, parts: Sequence[Part], states: Sequence[State], group: Any = None,
    kernel: str = "auto", scale: float | None = None, *, return_lse: Literal[True],
    softcap: float | None = None, sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


@overload
def combine(
    q: torch.Tensor, parts: Sequence[Part], states: Sequence[State], group: Any = None,
    kernel: str = "auto", scale: float | None = None, return_lse: bool = False,
    softcap: float | None = None, sinks: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


def combine(
    q: torch.Tensor,
    parts: Sequence[Part],
    states: Sequence[State],
    group: Any = None,
    kernel: str = "auto",
    scale: float | None = None,
    return_lse: bool = False,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """As :func:`union`, with ``states``, the results of other mixers, under the same normaliser:
    the sum of all weights times values over the sum of all weights (Chen et al. 2021,
    "Scatterbrain").

    >>> state = State(*linear(q, k, v, segments=segments, normalize=True, return_lse=True))
    >>> out = combine(q, [Part(k, v, plan)], [state], group)
    """
    if not parts:
        raise ValueError("union needs a part at least")
    comm = connect(group)
    check_wanted(comm, q, sinks, *(x for part in parts for x in (part.k, part.v)))
    degree = max(part.plan.ulysses for part in parts)
    scores = Scores(1 / math.sqrt(q.shape[-1]) if scale is None else scale, softcap or 0.0)
    _check(q, parts, states, comm, degree)
    if degree == 1:
        out, lse = _apply(q, parts, states, sinks, (comm, kernel, scores))
        return (out, lse) if return_lse else out
    layout = parts[0].plan.layout
    shared = Shared(layout, degree, q.shape[2], comm)
    given = [(q, layout)]
    for part in parts:
        given += [(part.k, part.plan.key_layout), (part.v, part.plan.key_layout)]
    for state in states:
        rows = rearrange(state.lse, "b h t -> b t h 1")
        given += [(state.out, layout), (rows, layout)]
    q, *rest = shared.into(*given)

    def own(x: float | torch.Tensor) -> float | torch.Tensor:
        return shared.own(x) if isinstance(x, torch.Tensor) else x

    inside = [
        Part(rest[2 * i], rest[2 * i + 1], part.plan.of_groups, own(part.log_weight))
        for i, part in enumerate(parts)
    ]
    rest = rest[2 * len(parts) :]
    others = [
        State(rest[2 * i], rearrange(rest[2 * i + 1], "b t h 1 -> b h t"), own(state.weight))
        for i, state in enumerate(states)
    ]
    sinks = None if sinks is None else shared.own(sinks)
    out, lse = _apply(q, inside, others, sinks, (shared.groups, kernel, scores))
    out = shared.back(out)
    if not return_lse:
        return out
    rows = shared.back(rearrange(lse, "b h t -> b t h 1"))
    return out, rearrange(rows, "b t h 1 -> b h t").detach()


def _apply(
    q: torch.Tensor,
    parts: Sequence[Part],
    states: Sequence[State],
    sinks: torch.Tensor | None,
    options: tuple[Comm, str, Scores],
) -> tuple[torch.Tensor, torch.Tensor]:
    given = [(part.plan, part.log_weight, part.rows) for part in parts]
    tensors = [x for part in parts for x in (part.k, part.v)]
    for state in states:
        weight = state.weight
        weight = weight if isinstance(weight, torch.Tensor) else state.lse.new_tensor([weight])
        tensors += [state.out, state.lse, weight]
    with torch.autocast(q.device.type, enabled=False):  # it would round states
        return _Union.apply(given, *options, q, sinks, *tensors)


class _Merged:
    """A running softmax: ``out`` ``[batch, tokens, heads, v_dim]`` and ``lse`` ``[batch, heads,
    tokens]``, float32 (float64 for float64)."""

    def __init__(self, q: torch.Tensor, v_dim: int, sinks: torch.Tensor | None) -> None:
        dtype = kernels.state_dtype(q.dtype)
        self.out = q.new_zeros(*q.shape[:3], v_dim, dtype=dtype)
        self.lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=dtype)
        if sinks is not None:
            self.lse.copy_(sinks.to(dtype)[:, None].expand_as(self.lse))

    def add(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Another part of the softmax."""
        lse = lse.to(self.lse.dtype)
        total = torch.logaddexp(self.lse, lse)
        # A row without any key so far has total = -inf; 0 in its place keeps exp() free of NaN.
        finite = total.masked_fill(total == -torch.inf, 0)
        before, now = torch.exp(self.lse - finite), torch.exp(lse - finite)
        self.out = self.out * _over_heads(before) + out * _over_heads(now)
        self.lse = total


def _over_heads(x: torch.Tensor) -> torch.Tensor:
    """``[batch, heads, tokens]`` beside ``[batch, tokens, heads, dim]``."""
    return rearrange(x, "b h t -> b t h 1")


def _weight(x: float | torch.Tensor) -> float | torch.Tensor:
    """Beside ``[batch, heads, tokens]``."""
    return x.detach()[:, None] if isinstance(x, torch.Tensor) else x


class _Union(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plans: Any, comm: Comm, kernel: str, scores: Scores, q: torch.Tensor,
        sinks: torch.Tensor | None, *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        ctx.given, ctx.sinks = (plans, comm, kernel, scores), sinks is not None
        merged = _Merged(q, tensors[1].shape[3], sinks)
        count = 2 * len(plans)
        for (plan, weight, rows), k, v in zip(
            plans, tensors[0:count:2], tensors[1:count:2], strict=True
        ):
            part = q if rows is None else rows.take(q)
            job = Job.make(plan, comm, kernel, q, (q.shape[3], v.shape[3]), scores)
            out, lse = forward(part, k, v, None, job, merged.out.dtype)
            turns = [(out, lse)] if rows is None else rows.turns(out, lse, q)
            for out, lse in turns:
                merged.add(out, lse + _weight(weight))
        for out, lse, weight in zip(*(tensors[count + i :: 3] for i in range(3)), strict=True):
            merged.add(out, lse + weight.detach().log()[:, None])
        out = merged.out.to(q.dtype)
        ctx.save_for_backward(q, *([sinks] if ctx.sinks else []), out, merged.lse, *tensors)
        ctx.mark_non_differentiable(merged.lse)
        ctx.set_materialize_grads(False)
        return out, merged.lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: torch.Tensor | None, _: Any) -> tuple[Any, ...]:
        plans, comm, kernel, scores = ctx.given
        count = 2 * len(plans)
        q, *saved = ctx.saved_tensors
        sinks = saved.pop(0) if ctx.sinks else None
        out, lse, *tensors = saved
        if dout is None:
            return (None,) * (6 + len(tensors))
        dq = q.new_zeros(q.shape, dtype=lse.dtype)
        grads: list[torch.Tensor | None] = []
        for (plan, weight, rows), k, v in zip(
            plans, tensors[0:count:2], tensors[1:count:2], strict=True
        ):
            part, own, total, incoming = q, out, lse, dout
            if rows is not None:
                part, own, incoming = rows.take(q), rows.take(out), rows.take(dout)
            # exp(s - (lse - weight)) is what a key of this part weighs.
            total = total - _weight(weight)
            if rows is not None:
                total = rows.take_lse(total)
            job = Job.make(plan, comm, kernel, q, (q.shape[3], v.shape[3]), scores)
            part_dq, dk, dv = backward(
                incoming.contiguous(), part, k, v, own.contiguous(), total.contiguous(), job,
                lse.dtype,
            )  # fmt: skip
            dq += part_dq if rows is None else rows.summed(part_dq, q)
            grads += [dk.to(k.dtype), dv.to(v.dtype)]
        dout, out = dout.to(lse.dtype), out.to(lse.dtype)
        for own, own_lse, weight in zip(*(tensors[count + i :: 3] for i in range(3)), strict=True):
            # Of the sum of weight exp(l) (o - out), over the normaliser.
            unit = torch.exp(own_lse.to(lse.dtype) - lse.masked_fill(lse == -torch.inf, torch.inf))
            gain = rearrange((dout * (own.to(lse.dtype) - out)).sum(-1), "b t h -> b h t") * unit
            times = weight.detach()[:, None].to(lse.dtype)
            d_weight = gain.sum((0, 2)).to(weight.dtype)
            grads += [
                (dout * _over_heads(unit * times)).to(own.dtype),
                (gain * times).to(own_lse.dtype),
                d_weight if len(weight) > 1 else d_weight.sum()[None],
            ]
        dsinks = None
        if sinks is not None:
            delta = rearrange((dout * out).sum(-1), "b t h -> b h t")
            finite = lse.masked_fill(lse == -torch.inf, torch.inf)
            weights = torch.exp(sinks.to(lse.dtype)[:, None] - finite)
            dsinks = -(weights * delta).sum((0, 2)).to(sinks.dtype)
        return None, None, None, None, dq.to(q.dtype), dsinks, *grads


def _check(
    q: torch.Tensor, parts: Sequence[Part], states: Sequence[State], comm: Comm, degree: int
) -> None:
    """ValueError for what does not fit."""
    layout = next((part.plan.layout for part in parts if part.rows is None), None)
    for part in parts:
        plan = part.plan
        check_world(comm, plan.world)
        if part.rows is not None and degree > 1:
            raise ValueError("parts with rows need plans with ulysses=1")
        if part.rows is None and plan.layout is not layout and plan.layout != layout:
            raise ValueError("all parts need plans with one layout of the queries")
        if part.rows is None and plan.ulysses != degree:
            raise ValueError("all parts need plans with one degree of ulysses")
        rows = q.shape[1] if part.rows is None else len(part.rows.index)
        for name, count, owned in (
            ("q", rows, plan.layout),
            ("k", part.k.shape[1], plan.key_layout),
            ("v", part.v.shape[1], plan.key_layout),
        ):
            if count != owned.count(comm.rank):
                raise ValueError(
                    f"{name} has {count} rows, rank {comm.rank} of its layout owns "
                    f"{owned.count(comm.rank)}"
                )
        for name, x in (("k", part.k), ("v", part.v)):
            if x.dtype != q.dtype or x.device != q.device:
                raise ValueError(f"{name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}")
        heads = q.shape[2] if part.rows is None else q.shape[2] // part.rows.shared
        if part.k.shape[2] != part.v.shape[2] or heads % max(1, part.k.shape[2]):
            raise ValueError(
                f"k and v need equal numbers of heads that divide {heads}; got "
                f"{part.k.shape[2]} and {part.v.shape[2]}"
            )
        if part.k.shape[3] != q.shape[3] or part.v.shape[3] != parts[0].v.shape[3]:
            raise ValueError("q and k need one head_dim, and all v another")
        weight = part.log_weight
        if isinstance(weight, torch.Tensor) and weight.requires_grad:
            raise ValueError("log_weight has no gradient; see State.weight")
    for state in states:
        if state.out.shape[:3] != q.shape[:3] or state.lse.shape != (
            q.shape[0], q.shape[2], q.shape[1]
        ):  # fmt: skip
            raise ValueError(
                f"a state needs out [batch, tokens, heads, v_dim] and lse [batch, heads, tokens] "
                f"of q {list(q.shape)}; got {list(state.out.shape)} and {list(state.lse.shape)}"
            )
