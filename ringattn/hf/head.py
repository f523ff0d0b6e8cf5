"""Log-probabilities of labels in chunks of tokens, for a causal model of transformers as it is: its
logits of all tokens never exist.

Inside of :func:`scoring` a call of the model with labels runs its body and then its head, a chunk
of supervised tokens at a time, each chunk computed again in the backward. The head is called as the
module that it is, so that adapters, a bias, quantised weights and an engine's hooks stay. How
logits follow from the head's product (a factor, a softcap) is learned when the model is probed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ringattn.batches import IGNORED
from ringattn.execution.carriers import connect
from ringattn.hf.attention import HERE, ActiveSplit, Probe
from ringattn.hf.compiled import uncompiled
from ringattn.hf.coverage import TOKENS, NotCovered, evaluating, router_weight, shortened
from ringattn.hf.router import shared_loss, top_of
from ringattn.models.loss import LEAST, capped


@dataclass
class Scored(ModelOutput):
    """What a model gives inside of :func:`scoring`. ``log_probs`` ``[batch, local tokens]``,
    float32: of each token's label, 0 where it has none. ``loss``: their negative sum over
    ``num_items_in_batch`` (on one rank by default its labels), and this rank's share of the router
    loss; ``aux_loss``: that share."""

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


@dataclass(frozen=True)
class Unembedding:
    """How logits follow from a head's product with the hidden states."""

    scale: float = 1.0
    softcap: float | None = None
    top: int | None = None  # experts a token goes to, where there is a router loss
    autocast: torch.dtype | None = None  # of what is wrapped around the model's forward

    def logits(self, product: torch.Tensor) -> torch.Tensor:
        return capped(product.float() * self.scale, self.softcap)


# What has been learned, by whether there is a router loss.
_KNOWN: WeakKeyDictionary[nn.Module, dict[bool, Unembedding]] = WeakKeyDictionary()


@contextmanager
def scoring(
    model: PreTrainedModel, chunk: int | None = None, temperature: float = 1.0
) -> Iterator[None]:
    """Inside, a call of ``model``, which is in a split, with ``shift_labels`` gives :class:`Scored`
    in place of logits. ``chunk``: tokens at a time; None: as many as make their logits as large as
    the hidden states. ``temperature``: logits are divided by it.

    The call raises NotCovered for a model whose logits are not its head's product with its hidden
    states, times a factor or with a softcap.
    """
    own = model.__dict__.get("forward")
    original = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        split: ActiveSplit = getattr(model, HERE)
        labels = kwargs.get("shift_labels")
        if args or labels is None or split.checking or kwargs.get("fused_lm_head"):
            return original(*args, **kwargs)
        known = _routes(model, kwargs) in _KNOWN.get(model, {})
        if split.probe is not None:
            return (original if known else partial(_learn, model, original))(**kwargs)
        if not known:
            _probe(model, original, kwargs)
        return _scored(model, kwargs, labels, chunk, temperature)

    forward.__signature__ = inspect.signature(original)
    model.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = own


def fit(
    product: torch.Tensor, logits: torch.Tensor, config: PretrainedConfig
) -> tuple[float, float | None] | None:
    """(factor, softcap) by which ``logits`` follow from the head's ``product``, both
    ``[..., vocab]``; None where they do not."""
    product, logits = product.float(), logits.float()
    scale = float((logits * product).sum() / (product * product).sum())
    for cap in (None, *_caps(config)):
        factor = scale if cap is None else 1.0
        want = product * factor if cap is None else cap * torch.tanh(product / cap)
        if float((want - logits).norm()) <= 0.01 * float(logits.norm()):
            return (1.0 if abs(factor - 1) < 1e-3 else factor), cap
    return None


def check_labels(labels: torch.Tensor) -> None:
    """Raises ValueError for labels that are neither tokens nor IGNORED."""
    wrong = labels[(labels < 0) & (labels != IGNORED)]
    if len(wrong):
        raise ValueError(f"labels of {int(wrong[0])}: what is not supervised is {IGNORED}")


def loud(product: torch.Tensor) -> float:
    """What makes the largest of a head's products 100: where they are small a softcap leaves no
    trace."""
    return 100.0 / float(product.abs().max().clamp(min=1e-6))


@contextmanager
def amplified(body: nn.Module, factor: float) -> Iterator[None]:
    """Inside, the hidden states that ``body`` gives are ``factor`` times as large."""

    def louder(_: nn.Module, args: tuple, out: Any) -> Any:
        out.last_hidden_state = out.last_hidden_state * factor
        return out

    handle = body.register_forward_hook(louder)
    try:
        yield
    finally:
        handle.remove()


def _caps(config: PretrainedConfig) -> list[float]:
    names = ("final_logit_softcapping", "logits_soft_cap")
    caps = [getattr(config, name, None) for name in names]
    return [float(cap) for cap in caps if cap]


def body_of(model: PreTrainedModel) -> nn.Module:
    """What gives the hidden states. Raises NotCovered where there is none inside."""
    for module in model.children():
        if isinstance(module, PreTrainedModel):
            return module
    raise NotCovered(f"{type(model).__name__} is no model with a body and a head")


def _learn(model: PreTrainedModel, original: Any, **kwargs: Any) -> Any:
    """What the model itself gives; learns from it how logits follow from hidden states."""
    body, name = body_of(model), type(model).__name__
    seen: list[Any] = []

    def record(_: nn.Module, args: tuple, out: Any) -> None:
        kind = out.last_hidden_state.device.type
        inside = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        seen[:] = [out.last_hidden_state, getattr(out, "router_logits", None), inside]

    handle = body.register_forward_hook(record)
    try:
        out = original(**kwargs)
    finally:
        handle.remove()
    hidden, routers, inside = seen
    kind = hidden.device.type
    outside = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    autocast = inside if inside != outside else None
    with _autocast(kind, autocast):
        product = model.get_output_embeddings()(hidden)
    with amplified(body, factor := loud(product)):
        logits = original(**kwargs).logits
    found = fit(factor * product.float(), logits, model.config.get_text_config())
    if found is None:
        raise NotCovered(
            f"{name}: its logits are not its head's product with its hidden states, times a factor "
            "or with a softcap; its loss cannot be computed in chunks (chunked_loss=False)"
        )
    top = None
    if isinstance(getattr(out, "aux_loss", None), torch.Tensor):
        top = top_of(model, routers, out.aux_loss)
        if top is None:
            raise NotCovered(
                f"{name} has a router loss of its own form; set output_router_logits=False"
            )
    _KNOWN.setdefault(model, {})[_routes(model, kwargs)] = Unembedding(*found, top, autocast)
    return out


def _routes(model: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    """Whether a call has a router loss, as transformers decides it."""
    asked = kwargs.get("output_router_logits")
    configured = getattr(model.config.get_text_config(), "output_router_logits", False)
    return bool(configured if asked is None else asked)


def _probe(model: PreTrainedModel, original: Any, kwargs: dict[str, Any]) -> None:
    """Learns from a few tokens, where the model has been probed otherwise before."""
    split: ActiveSplit = getattr(model, HERE)
    split.probe = Probe({module: path for path, module in model.named_modules()})
    try:
        with torch.no_grad(), uncompiled(model), evaluating(model):
            _learn(model, original, **shortened(model, kwargs, torch.arange(TOKENS)))
    finally:
        split.probe = None


def _autocast(kind: str, dtype: torch.dtype | None) -> Any:
    return nullcontext() if dtype is None else torch.autocast(kind, dtype)


def _scored(
    model: PreTrainedModel,
    kwargs: dict[str, Any],
    labels: torch.Tensor,
    chunk: int | None,
    temperature: float,
) -> Scored:
    known, body = _KNOWN[model][_routes(model, kwargs)], body_of(model)
    count = kwargs.get("num_items_in_batch")
    not_of_body = ("labels", "shift_labels", "num_items_in_batch", "logits_to_keep")
    inputs = {name: x for name, x in kwargs.items() if name not in not_of_body}
    if known.top is not None:
        inputs["output_router_logits"] = True
    with _autocast(labels.device.type, known.autocast):
        out = body(**inputs)
        head = model.get_output_embeddings()
        vocab = model.config.get_text_config().vocab_size
        each = _each(head, known, out.last_hidden_state, labels, vocab, chunk, temperature)
    count = (labels != IGNORED).sum().clamp(min=1) if count is None else count
    loss, share = -each.sum() / count, None
    if known.top is not None:
        comm = connect(getattr(model, HERE).group)
        share = shared_loss(out.router_logits, known.top, comm)
        loss = loss + router_weight(model) * share
    return Scored(loss, each, share)


def _each(
    head: nn.Module,
    known: Unembedding,
    hidden: torch.Tensor,  # [batch, tokens, dim]
    labels: torch.Tensor,  # [batch, tokens]
    vocab: int,
    chunk: int | None,
    temperature: float,
) -> torch.Tensor:
    """Log-probabilities of the labels, float32 ``[batch, tokens]``, 0 where there is none. The head
    is called once for all, whatever its chunks: an engine gathers its weights once."""
    flat, rows = labels.flatten(), hidden.flatten(0, 1)
    supervised = (flat != IGNORED).nonzero()[:, 0]
    if not len(supervised):  # all ranks must use the head's weights, and the loss stays connected
        supervised = flat.new_zeros(1)
    wanted = flat[supervised].clamp(min=0)
    original, own = head.forward, head.__dict__.get("forward")
    draws = any(isinstance(m, nn.Dropout) and m.p and m.training for m in head.modules())
    size = chunk or max(LEAST, len(rows) * rows.shape[-1] // vocab)

    def of(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        logits = known.logits(original(x)) / temperature
        return logits.gather(-1, index[:, None])[:, 0] - logits.logsumexp(-1)

    def in_chunks(x: torch.Tensor) -> torch.Tensor:
        parts = zip(x.split(size), wanted.split(size), strict=True)
        if not torch.is_grad_enabled():
            return torch.cat([of(*part) for part in parts])
        again = {"use_reentrant": False, "preserve_rng_state": draws}
        return torch.cat([checkpoint(of, *part, **again) for part in parts])

    head.__dict__["forward"] = in_chunks
    try:
        each = head(rows[supervised])
    finally:
        if own is None:
            del head.__dict__["forward"]
        else:
            head.__dict__["forward"] = own
    each = each.where(flat[supervised] != IGNORED, 0.0)
    return each.new_zeros(len(flat)).index_put((supervised,), each).view(labels.shape)
