"""One micro-batch on this rank: which sequences, their masks and plans, and this rank's tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ringattn.batches import IGNORED, position_ids
from ringattn.context import Context, Strategy
from ringattn.data.stream import Sequences
from ringattn.planning.layer_plans import LayerPlans
from ringattn.training.attention import Attention


@dataclass(frozen=True)
class MicroBatch:
    """One micro-step's tokens on this rank, ``[1, tokens]``, and the plans that they share."""

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    plans: LayerPlans

    @property
    def supervised(self) -> int:
        return int((self.labels != IGNORED).sum())


def load_batch(
    attention: Attention,
    layers: int,
    stream: Sequences,
    context: Context,
    split: Strategy,
    sequences: list[int],
) -> MicroBatch:
    """This rank's part of ``sequences``, for a model of so many ``layers``; only its own tokens are
    read."""
    spans = stream.batch_spans(sequences)
    documents = [span.length for span in spans]
    lengths = attention.lengths(documents, stream.seq_len)
    masks = attention.masks(documents, stream.seq_len)
    states = attention.states(documents, stream.seq_len)
    plans = split.plans(masks, attention.layers(layers), states)
    local = stream.local(spans, plans.layout, context.cp_rank)
    tokens, labels, positions = (
        x.to(context.device)
        for x in (
            torch.from_numpy(local.tokens),
            torch.from_numpy(local.labels),
            position_ids(plans.layout, context.cp_rank, lengths),
        )
    )
    return MicroBatch(tokens[None], labels[None], positions, plans)


def numbers(batch_size: int, context: Context, seen: int, micro: int) -> list[int]:
    """The sequence numbers of one micro-step: they depend on the data coordinate only."""
    first = seen + (micro * context.dp + context.dp_rank) * batch_size
    return list(range(first, first + batch_size))
