"""An unchanged causal model of transformers with the interface of our decoder, for ``train.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from ringattn.execution.carriers import ProcessRank
from ringattn.hf.attention import HERE, ActiveSplit, Attend, Probe
from ringattn.hf.batch import lengths_of
from ringattn.hf.coverage import TOKENS, NotCovered, evaluating, probe, router_weight
from ringattn.hf.describe import empty_model, layers_of
from ringattn.hf.head import amplified, body_of, fit, loud
from ringattn.hf.inside import installed
from ringattn.hf.kinds import assign
from ringattn.hf.mixers import exchange, has_mixers
from ringattn.hf.proof import compare
from ringattn.hf.router import shared_loss, top_of
from ringattn.hf.split import follow_length, follows_length
from ringattn.make import make_plan
from ringattn.models import recompute
from ringattn.models.decoder import Head
from ringattn.models.lora_config import Lora
from ringattn.models.memory import Memory
from ringattn.planning import masks
from ringattn.planning.layer_plans import LayerPlans
from ringattn.planning.plan import Plan
from ringattn.planning.segments import Segments


class SplitModel(nn.Module):
    """``forward(tokens, positions, attend, labels)`` as of
    :class:`ringattn.models.decoder.Decoder`; with labels the tuple has a fourth element, the share
    of this rank in the router loss (None where there is none). Called with ``input_ids=`` it is the
    model of transformers itself, and with ``hidden=`` its head.

    ``config``: of the model; ``kinds``: the kind of each layer, by which ``attend`` is asked;
    ``lora``: the adapters that it gets, if any. Under the meta device parameters have no memory,
    but buffers do.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        memory: Memory,
        kinds: Sequence[str],
        lora: Lora | None = None,
    ) -> None:
        super().__init__()
        self.memory, self.kinds, self.lora = memory, tuple(kinds), lora
        on_meta = torch.get_default_device().type == "meta"
        self.inner = empty_model(config, weights=not on_meta)
        head = self.inner.get_output_embeddings()
        if head.bias is not None:
            raise NotCovered(f"{type(self.inner).__name__}: a head with a bias is not covered")
        with torch.device("meta"):
            ours = Head(head.in_features, head.out_features, bias=False)
        ours.weight = head.weight
        self.inner.set_output_embeddings(ours)
        if lora is not None:
            from ringattn.hf.lora import adapt  # here: peft is an extra

            adapt(self.inner, lora)
        # What logits are beside the head's product; found by the self-check.
        self.logit_scale, self.logit_softcap, self.top = 1.0, None, None
        text = self.inner.config.get_text_config()
        self.routes = bool(getattr(text, "output_router_logits", False))
        if memory.checkpoint:
            self.inner._set_gradient_checkpointing(True, partial(_again, memory))
        for module in filter(follows_length, self.inner.modules()):
            follow_length(module)
        exchange(self.inner)
        # Whether modules have to know the documents.
        self.by_document = has_mixers(self.inner)
        self.by_document |= any(map(follows_length, self.inner.modules()))
        self.inner.train()

    @property
    def body(self) -> nn.Module:
        """What gives the hidden states."""
        return body_of(self.inner)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The layers."""
        return layers_of(self.inner)

    @property
    def ends(self) -> Sequence[nn.Module]:
        """Embedding and head, if their weights are their own."""
        table, head = self.inner.get_input_embeddings(), self.inner.get_output_embeddings()
        return () if self.tied else (table, head)

    @property
    def tied(self) -> bool:
        return bool(getattr(self.inner.config.get_text_config(), "tie_word_embeddings", False))

    def tie(self) -> None:
        """Makes the head's weight the embedding's, if the model is so configured."""
        if self.tied:
            self.inner.get_output_embeddings().weight = self.inner.get_input_embeddings().weight

    def forward(
        self,
        tokens: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        attend: Mapping[str, Attend] | None = None,
        labels: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
        **as_transformers: Any,
    ) -> Any:
        if hidden is not None:
            return self.inner.get_output_embeddings()(hidden)
        if as_transformers:
            return self.inner(**as_transformers, use_cache=False)
        self._install(attend)
        inputs = {"input_ids": tokens, "position_ids": positions[None], "use_cache": False}
        if labels is None:
            return self.inner(**inputs).logits
        routes = self.routes and torch.is_grad_enabled()
        more = {"output_router_logits": True} if routes else {}
        out = self.body(**inputs, **more)
        hidden = out.last_hidden_state * self.logit_scale
        head = self.inner.get_output_embeddings()
        share = None
        if routes:
            share = shared_loss(out.router_logits, self.top, ProcessRank(None))
            share = share * router_weight(self.inner)
        return *head(hidden, labels, self.memory, self.logit_softcap), share

    def _install(self, attend: Mapping[str, Attend]) -> None:
        """Hands the layers the functions of this forward, and of its backward."""
        known = {
            kind: each.keywords if isinstance(each, partial) else each
            for kind, each in attend.items()
        }
        plans = {kind: each["plan"] for kind, each in known.items() if "plan" in each}
        along = next((each["segments"] for each in known.values() if "segments" in each), None)
        group = next(iter(known.values()))["group"]
        plans = plans or _of_documents(along)
        lengths = lengths_of(plans) if self.by_document else []
        split = ActiveSplit(
            plans, group, "auto", lengths, attends=attend, kinds=self.kinds, along=along
        )
        for module in self.inner.modules():  # where they find it in the backward, too
            object.__setattr__(module, HERE, split)

    def self_check(self, root: nn.Module, plans: LayerPlans, group: Any, kernel: str) -> None:
        """Proves that this model, called through ``root`` (an engine's module around it), is that
        of one process: see :func:`ringattn.hf.check`; and learns what its logits and its router
        loss are made of. Collective over all ranks. Raises NotCovered, ValueError."""
        known = plans or _of_documents(next(iter(plans.segments.values())))
        split = ActiveSplit(known, group, kernel, lengths_of(known))
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.inner.device)
        inputs = {"input_ids": ids, "position_ids": ids}
        with installed(self.inner, split):
            layers = probe(self.inner, inputs, root)
            split.of = assign(split, layers, self.inner.config.get_text_config())
            if plans.world > 1:
                compare(self.inner, inputs, root)
            self._learn(root)

    def _learn(self, root: nn.Module) -> None:
        """How logits follow from the head's product with the hidden states, and how many experts a
        token goes to."""
        split: ActiveSplit = getattr(self.inner, HERE)
        name, config = type(self.inner).__name__, self.inner.config.get_text_config()
        ids = torch.arange(TOKENS, device=self.inner.device)[None] % config.vocab_size
        hidden: list[torch.Tensor] = []
        handle = self.body.register_forward_hook(
            lambda module, args, out: hidden.append(out.last_hidden_state.detach())
        )
        inputs = {"input_ids": ids, "position_ids": torch.arange(TOKENS, device=ids.device)[None]}
        called: set[nn.Module] = set()
        handles = [
            module.register_forward_hook(lambda module, args, out: called.add(module))
            for module in self.inner.modules()
        ]
        split.probe = Probe(dict.fromkeys(self.inner.modules(), ""))
        try:
            with torch.no_grad(), evaluating(root):
                more = {"output_router_logits": True} if self.routes else {}
                out = root(**inputs, **more)
                product = root(hidden=hidden[0])
                with amplified(self.body, factor := loud(product)):
                    logits = root(**inputs).logits
        finally:
            split.probe = None
            for each in (handle, *handles):
                each.remove()
        if self.lora is not None:
            from ringattn.hf.lora import check_used

            check_used(self.inner, called)
        if (found := fit(factor * product.float(), logits, config)) is None:
            raise NotCovered(
                f"{name}: its logits are not its head's product with its hidden states, times a "
                "factor or with a softcap; its loss cannot be computed in chunks"
            )
        self.logit_scale, self.logit_softcap = found
        if self.routes:
            self.top = top_of(self.inner, out.router_logits, out.aux_loss)
            if self.top is None:
                raise NotCovered(
                    f"{name} has a router loss of its own form; set output_router_logits to false "
                    "in its config.json"
                )


def _of_documents(segments: Segments) -> dict[str | None, Plan]:
    """Where no layer attends: one plan all the same, which says what all layers share."""
    return {None: make_plan(masks.documents(segments.lengths), segments.layout)}


def _again(memory: Memory, function: Any, *args: Any) -> Any:
    """In place of transformers' checkpointing: attention is kept."""
    return recompute.keeping(memory, function, *args, draws=True)
