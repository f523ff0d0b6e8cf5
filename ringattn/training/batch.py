"""One micro-batch on this rank: which sequences, their masks and plans, and this rank's tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ringattn.batches import IGNORED, position_ids
from ringattn.context import Context, Strategy
from ringattn.cost.model import Sizes, step_flops
from ringattn.data.stream import Sequences
from ringattn.planning.balancing import deal, imbalance
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


def numbers(
    attention: Attention,
    model: Sizes,
    stream: Sequences,
    context: Context,
    batch_size: int,
    micro_steps: int,
    seen: int,
    balance: bool,
) -> tuple[list[list[int]], float]:
    """(the sequence numbers of every micro-step of an optimizer step, for this data rank; how
    unequal the work of data ranks is, see :func:`ringattn.planning.balancing.imbalance`).

    They depend on the data coordinate only. With ``balance`` the sequences of the step, which stay
    the same, are dealt by how much work they are.
    """
    dp, count = context.dp, batch_size * micro_steps * context.dp
    if dp == 1:
        first = range(seen, seen + count, batch_size)
        return [list(range(at, at + batch_size)) for at in first], 1.0
    work = [
        step_flops(model, stream.seq_len, _area(attention, model.layers, stream, seen + number))
        for number in range(count)
    ]
    if balance:
        dealt = deal(work, dp, micro_steps, batch_size)
    else:
        batches = [list(range(at, at + batch_size)) for at in range(0, count, batch_size)]
        dealt = [batches[at : at + dp] for at in range(0, len(batches), dp)]
    each = np.array([[sum(work[i] for i in own) for own in ranks] for ranks in dealt])
    own = [[seen + number for number in ranks[context.dp_rank]] for ranks in dealt]
    return own, imbalance(each)


def _area(attention: Attention, layers: int, stream: Sequences, sequence: int) -> float:
    """Attended pairs of a sequence in a layer, on the mean."""
    lengths = [span.length for span in stream.spans(sequence)]
    areas = {kind: mask.area for kind, mask in attention.masks(lengths, stream.seq_len).items()}
    texts = attention.lengths(lengths, stream.seq_len)
    areas |= {kind: own.area(texts) for kind, own in attention.sets.items()}
    return sum(areas.get(kind, 0) for kind in attention.layers(layers)) / layers
