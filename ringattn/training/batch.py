"""One micro-batch on this rank: which sequences, their mask and plan, and this rank's tokens."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from omegaconf import DictConfig

from ringattn import masks
from ringattn.context import IGNORED, Context, Strategy, position_ids
from ringattn.cost import Hardware
from ringattn.data.stream import Sequences, Span
from ringattn.masks import Mask
from ringattn.models.decoder import ModelConfig
from ringattn.plan import Plan


@dataclass(frozen=True)
class MicroBatch:
    """One micro-step's tokens on this rank, ``[1, tokens]``, and the plan that they share."""

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    plan: Plan

    @property
    def supervised(self) -> int:
        return int((self.labels != IGNORED).sum())


def segments(config: DictConfig, spans: list[Span], seq_len: int) -> list[int]:
    """The lengths of what attends itself only: documents, or whole sequences of ``seq_len``."""
    if config.attention.name == "documents":
        return [span.length for span in spans]
    return [seq_len] * (sum(span.length for span in spans) // seq_len)


def build_mask(config: DictConfig, lengths: list[int]) -> Mask:
    """The mask of segments laid end to end: causal, within the window or at the first keys."""
    window, sinks = config.attention.window, config.attention.sinks
    n = sum(lengths)
    if window is None:
        return masks.documents(lengths)
    slices = []
    for at, length in zip(accumulate(lengths, initial=0), lengths, strict=False):
        own, first = masks.Run(at, at + length), masks.Run(at, at + min(length, sinks))
        near = masks.Slice.make(own, own, 1 - window, 0)
        far = masks.Slice.make(own, first, None, -window)  # the first keys, beyond the window
        slices += [near, far]
    return masks.from_slices(slices, n, n)


def strategy(config: DictConfig, model: ModelConfig, hardware: Hardware | None = None) -> Strategy:
    """How this run splits its masks; ``hardware``: what a schedule of "auto" counts on."""
    parallel = config.parallel
    return Strategy(
        cp=parallel.cp,
        layout=parallel.layout,
        schedule=parallel.schedule,
        ulysses=parallel.ulysses,
        node_size=parallel.node_size,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        hardware=hardware,
    )


def load_batch(
    config: DictConfig,
    stream: Sequences,
    context: Context,
    split: Strategy,
    sequences: list[int],
) -> MicroBatch:
    """This rank's part of ``sequences``; only its own tokens are read."""
    spans = stream.batch_spans(sequences)
    lengths = segments(config, spans, stream.seq_len)
    plan = split.plan(build_mask(config, lengths))
    local = stream.local(spans, plan.layout, context.cp_rank)
    tokens, labels, positions = (
        x.to(context.device)
        for x in (
            torch.from_numpy(local.tokens),
            torch.from_numpy(local.labels),
            position_ids(plan.layout, context.cp_rank, lengths),
        )
    )
    return MicroBatch(tokens[None], labels[None], positions, plan)


def numbers(config: DictConfig, context: Context, seen: int, micro: int) -> list[int]:
    """The sequence numbers of one micro-step: they depend on the data coordinate only."""
    first = seen + (micro * context.dp + context.dp_rank) * config.batch_size
    return list(range(first, first + config.batch_size))
