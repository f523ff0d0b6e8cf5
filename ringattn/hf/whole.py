"""Whole sequences into a model and whole results out of it, each rank computing its own tokens.

What trainers are made for is a model that is given a batch and gives a loss, log-probabilities or
logits of it. Inside of :func:`whole_calls` a model on split sequences is one: the ranks of a
sequence call it with the same whole batch, each computes its tokens, and what comes out is whole
again on all of them, in value and in gradient. To its trainer these ranks are what ranks of tensor
parallelism are: replicas of one batch.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ringattn.batches import IGNORED
from ringattn.execution.carriers import connect
from ringattn.hf import agree
from ringattn.hf.attention import HERE, PADDED
from ringattn.hf.batch import both_ways, local_batch
from ringattn.hf.coverage import NotCovered, language_model
from ringattn.hf.head import check_labels, scoring
from ringattn.hf.inputs import by_name
from ringattn.hf.split import after_call, before_call, inside_of, make_split
from ringattn.planning.layer_plans import LayerPlans

PlansOf = Callable[[Sequence[int]], LayerPlans]  # of packed documents of these lengths

# Outputs with an axis of tokens; those of TRL's fused head are a token shorter than its inputs.
_BY_TOKEN = ("logits", "last_hidden_state", "log_probs", "label_mask", "is_top1", "entropy",
             "log_sum_sq_probs", "mean_logits")  # fmt: skip
_SUMMED = ("loss", "aux_loss")
# What collators say beside position_ids of the same packed documents.
_SAID_AGAIN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


@dataclass(frozen=True)
class Documents:
    """The documents of a batch ``[rows, tokens]``, end to end without padding."""

    rows: int
    tokens: int
    lengths: tuple[int, ...]
    kept: torch.Tensor | None  # int64: where their tokens are in the flattened batch; None: all

    def flat(self, x: torch.Tensor) -> torch.Tensor:
        """``[1, all tokens, ...]`` of a tensor of the batch."""
        flat = x.flatten(0, 1)
        return (flat if self.kept is None else flat[self.kept])[None]

    def batch(self, flat: torch.Tensor) -> torch.Tensor:
        """The batch's shape again of ``[1, all tokens, ...]``; 0 where there was padding."""
        shape = (self.rows, self.tokens, *flat.shape[2:])
        if self.kept is None:
            return flat.view(shape)
        empty = flat.new_zeros(self.rows * self.tokens, *flat.shape[2:])
        return empty.index_put((self.kept,), flat[0]).view(shape)


def documents_of(inputs: dict[str, Any], unpad: bool = False) -> Documents:
    """The documents of a batch of transformers: rows ``[rows, tokens]``, packed ones told by
    ``position_ids`` that begin at 0 again. Padding, told by the ``attention_mask``, is left out if
    ``unpad``.

    Raises ValueError for padding otherwise; for positions that do not count from 0 in each
    document; for an ``attention_mask`` that numbers documents; and where documents are told twice
    and differ.
    """
    known = next(
        x for name in ("input_ids", "inputs_embeds") if (x := inputs.get(name)) is not None
    )
    rows, tokens = known.shape[:2]
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    kept = torch.ones(rows, tokens, dtype=torch.bool)
    if mask is not None:
        if mask.dim() != 2 or int(mask.max()) > 1:
            raise ValueError(
                f"attention_mask {list(mask.shape)} with values to {int(mask.max())}: it may say "
                "which tokens are padding, [batch, tokens] of 0 and 1; packed documents are told "
                "by position_ids that begin at 0 again"
            )
        kept = mask.bool().cpu()
    if not unpad and not bool(kept.all()):
        raise ValueError(
            f"{int((~kept).sum())} of {kept.numel()} tokens are padding; {PADDED}: in TRL by "
            "packing=True or padding_free=True, or one row a batch; or let Split(unpad=True) take "
            "padding away"
        )
    if positions is None:
        lengths = kept.sum(1).tolist()
    else:
        if positions.dim() != 2:
            raise ValueError(
                f"position_ids {list(positions.shape)}: only [batch, tokens] are split"
            )
        flat = positions.cpu().expand(rows, tokens)[kept]
        starts = (flat == 0).nonzero()[:, 0]
        starts = starts if len(starts) else torch.zeros(1, dtype=torch.int64)
        ends = torch.cat([starts[1:], torch.tensor([len(flat)])])
        lengths = ends - starts
        counted = torch.arange(int(starts[0]), len(flat)) - starts.repeat_interleave(lengths)
        if int(starts[0]) or not torch.equal(counted, flat):
            raise ValueError(
                f"position_ids {flat[:8].tolist()}... do not count from 0 in each document"
            )
        lengths = lengths.tolist()
        whole = kept.sum(1).cumsum(0)
        if not set(whole.tolist()) <= {0, *torch.tensor(lengths).cumsum(0).tolist()}:
            raise ValueError("position_ids: a row of the batch does not begin at 0")
    _check_said_again(inputs, lengths)
    where = None if bool(kept.all()) else kept.flatten().nonzero()[:, 0].to(known.device)
    return Documents(rows, tokens, tuple(n for n in lengths if n), where)


def _check_said_again(inputs: dict[str, Any], lengths: Sequence[int]) -> None:
    ends = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        told = inputs.get(name)
        if told is not None and told.tolist() != ends:
            raise ValueError(f"{name} {told.tolist()[:8]} are not the documents of position_ids, "
                             f"which end at {ends[:8]}")  # fmt: skip
    told = inputs.get("seq_idx")
    if told is not None:
        counts = torch.tensor(lengths)
        want = torch.arange(len(counts)).repeat_interleave(counts)
        if told.numel() != len(want) or not torch.equal(told.flatten().cpu().long(), want):
            raise ValueError("seq_idx does not say the documents that position_ids say")


def supervised(labels: torch.Tensor, documents: Documents) -> torch.Tensor:
    """Labels ``[rows, tokens]``, not yet shifted, of those tokens alone that one before them in
    their document predicts: not of first ones, and not of padding."""
    starts = torch.tensor([0, *documents.lengths[:-1]]).cumsum(0).to(labels.device)
    flat = labels.flatten().clone()
    if documents.kept is not None:
        empty = torch.full_like(flat, IGNORED)
        flat = empty.index_put((documents.kept,), flat[documents.kept])
        starts = documents.kept[starts]
    flat[starts] = IGNORED
    return flat.view(labels.shape)


@dataclass
class _Call:
    """One model, while calls of it are whole."""

    model: PreTrainedModel
    plans_of: PlansOf
    group: Any
    kernel: str
    mixers: str
    unpad: bool
    logits: bool
    inside: ExitStack = field(default_factory=ExitStack)
    plans: LayerPlans | None = None
    running: tuple[Documents, bool, bool] | None = None  # has labels; a fused head of TRL's

    @cached_property
    def rank(self) -> int:
        return connect(self.group).rank

    def before(self, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> Any:
        split = getattr(model, HERE, None)
        bound = by_name(model, args, kwargs)
        if split is not None and (split.probe is not None or split.checking):
            return (), before_call(model, bound, True)
        local = self._agreed(bound)
        return (), before_call(model, local, True)

    def _agreed(self, bound: dict[str, Any]) -> dict[str, Any]:
        """This rank's part of the call. Raises on all ranks what one of them raises, and where they
        are called with different batches."""
        error, digest, local = None, 0, {}
        try:
            digest = _digest(bound)
            local = self._local(bound)
        except Exception as caught:
            error = caught
        comm = connect(self.group)
        everyone = agree.gather(comm, torch.tensor([int(error is not None), digest]))
        if error is not None:
            raise error
        if bool(everyone[:, 0].any()):
            raise ValueError("another rank of the sequence has refused its batch")
        if bool((everyone[:, 1] != everyone[0, 1]).any()):
            raise ValueError(
                "ranks of one sequence have read different batches: their samplers are not alike "
                "(a generator that is not seeded alike on all ranks?)"
            )
        return local

    def _local(self, bound: dict[str, Any]) -> dict[str, Any]:
        documents = documents_of(bound, self.unpad)
        plans = self.plans_of(documents.lengths)
        if plans is not self.plans:
            self.inside.close()
            split = make_split(plans, self.group, self.kernel, self.mixers)
            self.inside.enter_context(inside_of(self.model, split))
            self.plans = plans
        if bound.get("shift_labels") is not None:
            raise ValueError(
                "shift_labels are given: labels are shifted here, on whole documents; give labels "
                "that stand with their own tokens, as transformers does"
            )
        labels, ids = bound.get("labels"), bound.get("input_ids")
        if labels is not None and labels.shape[:2] != (documents.rows, documents.tokens):
            raise ValueError(f"labels {list(labels.shape)} are not by token")
        labels = None if labels is None else documents.flat(labels)
        if labels is not None:
            check_labels(labels)
        left_out = ("input_ids", "inputs_embeds", "position_ids", "attention_mask", "labels",
                    *_SAID_AGAIN)  # fmt: skip
        local = {name: x for name, x in bound.items() if name not in left_out}
        if bound.get("logits_to_keep"):
            raise ValueError("logits_to_keep: logits of all tokens are given")
        stands_for = ids if ids is not None else bound["inputs_embeds"]
        own = local_batch(plans, self.rank, documents.flat(stands_for), labels)
        if ids is None:
            own["inputs_embeds"] = own.pop("input_ids")
        if labels is None:
            own = {name: x for name, x in own.items() if "labels" not in name}
        elif local.get("num_items_in_batch") is None:
            local["num_items_in_batch"] = _count(labels, documents, both_ways(plans))
        fused = bool(bound.get("fused_lm_head"))
        self.running = documents, labels is not None, fused
        return local | own

    def after(self, model: PreTrainedModel, args: tuple, out: Any) -> Any:
        split = getattr(model, HERE, None)
        if split is None or split.probe is not None or split.checking:
            return after_call(model, args, out) if split is not None else None
        after_call(model, args, out)
        (documents, labelled, fused), self.running = self.running, None
        if not isinstance(out, dict):
            raise NotCovered(f"{type(model).__name__} gives no named outputs: return_dict=True")
        fields, layout = {}, split.any.layout
        for name, x in out.items():
            if name in _SUMMED and isinstance(x, torch.Tensor):
                fields[name] = _Summed.apply(x, self.group, layout.world)
            elif name in _BY_TOKEN and (name != "logits" or self.logits or not labelled):
                whole = documents.batch(Gathered.apply(x, self.group, layout, layout.world))
                fields[name] = whole[:, :-1] if fused else whole
        return type(out)(**fields)


def _count(labels: torch.Tensor, documents: Documents, whole: bool) -> torch.Tensor:
    """Supervised tokens of a batch, at least 1. The first of a document is nobody's next."""
    if whole:
        return (labels != IGNORED).sum().clamp(min=1)
    flat = Documents(1, labels.shape[1], documents.lengths, None)
    return (supervised(labels, flat) != IGNORED).sum().clamp(min=1)


def _digest(bound: dict[str, Any]) -> int:
    value = 0
    for name in ("input_ids", "inputs_embeds", "labels", "position_ids", "attention_mask"):
        x = bound.get(name)
        if isinstance(x, torch.Tensor):
            raw = x.detach().cpu().contiguous().flatten().view(torch.uint8)
            value = zlib.crc32(raw.numpy(), value)
    return value


@contextmanager
def whole_calls(
    model: nn.Module,
    plans_of: PlansOf,
    group: Any = None,
    *,
    kernel: str = "auto",
    mixers: str = "refuse",
    unpad: bool = False,
    chunked_loss: bool = True,
    loss_chunk: int | None = None,
    logits: bool = False,
) -> Iterator[None]:
    """Inside, the ranks of ``group`` call ``model`` with the same whole batch, and get the same
    whole results; forward and backward belong inside.

    The batch is as transformers has it: ``input_ids`` ``[rows, tokens]`` or ``inputs_embeds``,
    ``position_ids`` that begin at 0 again for packed documents, ``labels`` that stand with their
    own tokens, ``num_items_in_batch``. Of the results there are ``loss`` and ``aux_loss``, and
    ``logits`` (``[rows, tokens, vocab]``) where no labels are given or ``logits`` are asked for;
    of a model with TRL's fused head its outputs. Gradients are those of whole results where the
    gradients of all ranks, those of ``group`` among them, are then averaged, as DDP, FSDP and ZeRO
    do.

    ``plans_of``: the plans of documents of given lengths; ``unpad``: see :func:`documents_of`;
    ``chunked_loss``, ``loss_chunk``: see :func:`ringattn.hf.head.scoring`.

    Calls raise ValueError as :func:`ringattn.hf.split_sequence` and :func:`documents_of` do, on all
    ranks; where ranks have different batches; and for labels that are shifted already.
    """
    inside = language_model(model)
    call = _Call(inside, plans_of, group, kernel, mixers, unpad, logits)
    handles = [
        inside.register_forward_pre_hook(call.before, prepend=True, with_kwargs=True),
        inside.register_forward_hook(call.after),
    ]
    chunked = chunked_loss and not logits
    try:
        with scoring(inside, loss_chunk) if chunked else nullcontext(), call.inside:
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Summed(torch.autograd.Function):
    """The sum of the ranks' parts, on every rank. Its gradient, which is alike on all ranks, goes
    to each part as often as there are ranks: their average is taken afterwards."""

    @staticmethod
    def forward(ctx, x, group, world):
        ctx.world = world
        return agree.total(connect(group), x.detach().flatten()).reshape(x.shape).clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.world, None, None


class Gathered(torch.autograd.Function):
    """The whole ``[batch, tokens, ...]`` on every rank from parts ``[batch, local tokens, ...]``; a
    part's gradient is its own of the whole's, times ``factor``."""

    @staticmethod
    def forward(ctx, x, group, layout, factor):
        ctx.layout, ctx.rank, ctx.factor = layout, connect(group).rank, factor
        return agree.whole(connect(group), layout, x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.layout.shard(grad, ctx.rank) * ctx.factor, None, None, None
