"""The plans of a trainer's batches: how they are split is said once, and "auto" chosen once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import nn

from ringattn.hf.coverage import language_model
from ringattn.hf.kinds import is_causal, make_plans, pairs_of, text_config
from ringattn.planning import masks
from ringattn.planning.layer_plans import LayerPlans

_KEPT = 16  # of plans: rows of one length come again and again


@dataclass(frozen=True)
class Split:
    """How the sequences of a trainer are split, and what is kept of them for the backward.

    Args:
        cp: ranks that share a sequence; the others read other sequences.
        layout: who owns which tokens: "balanced", "zigzag", "striped" or "contiguous".
        schedule: how keys and values travel; "auto": chosen by what it costs, for each kind of
            layer, at the first batch. Or a mapping of kinds of layer to schedules.
        ulysses: ranks that heads are split over; None: 1, or what "auto" chooses.
        node_size: neighbouring ranks with a fast link, for "double_ring" and "auto".
        kernel: the block kernel, by name.
        mixers: "gather": modules that mix tokens in a way of their own are computed on whole
            sequences, on every rank; "refuse": they are an error.
        unpad: padding is left out of batches; False: it is an error, for it says that rows are
            padded where they could be packed.
        balance: the samples of an optimizer step go to data ranks and micro-steps by how much work
            they are; False: in their own order.
        chunked_loss: the loss in chunks of tokens, so that logits of all of them never exist;
            False: the model's own.
        loss_chunk: tokens at a time; None: as many as make their logits as large as the hidden
            states.
        keep_attention: gradient checkpointing keeps attention's results, so that neither it nor
            its exchanges are computed again; False: transformers' own checkpointing.
        offload: what is then kept waits in host memory.
    """

    cp: int
    layout: str = "balanced"
    schedule: str | dict[str, str] = "auto"
    ulysses: int | None = None
    node_size: int | None = None
    kernel: str = "auto"
    mixers: str = "refuse"
    unpad: bool = False
    balance: bool = True
    chunked_loss: bool = True
    loss_chunk: int | None = None
    keep_attention: bool = True
    offload: bool = False


class Planner:
    """The plans of packed documents, by their lengths, for ``model`` split as ``split`` says;
    ``itemsize``: bytes of an element of q, k and v.

    Raises ValueError for a model that was made with another attention, or is not covered.
    """

    def __init__(self, model: nn.Module, split: Split, itemsize: int = 2) -> None:
        config = text_config(model)
        self.model, self.split, self.itemsize = language_model(model), split, itemsize
        self.causal = is_causal(model)
        self.heads = getattr(config, "num_attention_heads", None)
        self.kv_heads = getattr(config, "num_key_value_heads", None) or self.heads
        self.head_dim = getattr(config, "head_dim", None)
        if self.heads and not self.head_dim:
            self.head_dim = config.hidden_size // self.heads
        self.parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
        self.chosen: dict[str, dict[str, str | int]] | None = None
        self.first: LayerPlans | None = None  # of the first batch
        self._pairs: Callable[[int], int] | None = None
        self._longest = 0
        self._plans = lru_cache(_KEPT)(self._make)

    def __call__(self, lengths: Sequence[int]) -> LayerPlans:
        return self._plans(tuple(lengths))

    def _make(self, lengths: tuple[int, ...]) -> LayerPlans:
        split, given = self.split, {"schedule": self.split.schedule, "ulysses": self.split.ulysses}
        if self.heads:
            given |= {"heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
            given["itemsize"] = self.itemsize
        plans = make_plans(
            self.model,
            masks.documents(lengths, causal=self.causal),
            split.layout,
            world=split.cp,
            node_size=split.node_size,
            **given | (self.chosen or {}),
        )
        if self.first is None:
            self.first = plans
            self.chosen = {
                "schedule": {kind: plan.schedule for kind, plan in plans.items()},
                "ulysses": {kind: plan.ulysses for kind, plan in plans.items()},
            }
        return plans

    def work(self, lengths: Sequence[int]) -> float:
        """Forward FLOPs of packed documents: two a parameter and token, and four a pair, head and
        width of every layer."""
        if self._pairs is None or max(lengths, default=0) > self._longest:
            self._longest = max(2 * max(lengths, default=1), 4096)
            self._pairs = pairs_of(self.model, self._longest)
        pairs = 4.0 * (self.heads or 0) * (self.head_dim or 0) * sum(map(self._pairs, lengths))
        return 2.0 * self.parameters * sum(lengths) + pairs

    def told(self, dp: int) -> str:
        """What is said of the split at the first batch, in a few lines."""
        plans, split = self.first, self.split
        assert plans is not None and plans.shared is not None
        n = plans.layout.n
        received = sum(
            int(count * plans[kind].recv_tokens(0)) for kind, count in plans.counts.items()
        )
        kinds = ", ".join(f"{kind} x{count}" for kind, count in plans.counts.items())
        documents = len(plans.shared.pieces)
        lines = [
            f"ringattn: {plans.world * dp} ranks, {dp} x {split.cp} (data x context); "
            f"layout {split.layout}, schedule {plans.schedule}, ulysses {plans.ulysses}",
            f"  first batch: {n:,} tokens in {documents} documents; layers: {kinds}; "
            f"largest work of a rank {plans.imbalance:.3f} x the mean; keys that rank 0 receives: "
            f"{received:,} tokens",
        ]
        if plans.world > 1:
            lines.append("  self-check passed: a short sequence is the same in one process")
        if plans.reason:
            lines.append(f"  {plans.reason}")
        return "\n".join(lines)
