"""Held-out loss, by position too, and retrieval probes: with the split, the engine and the loss of
training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ringattn.batches import IGNORED
from ringattn.context import Context, Strategy
from ringattn.data.open_data import Opened
from ringattn.data.probes import Probe
from ringattn.data.stream import Sequences
from ringattn.training.batch import load_batch
from ringattn.training.engines import Engine
from ringattn.training.evaluating.settings import Eval
from ringattn.training.run import TrainingRun


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated every ``eval.every`` steps. All methods are collective.

    ``probes``: (task, length, depth) of every cell of the heat maps.
    """

    training: TrainingRun
    context: Context
    engine: Engine
    split: Strategy
    held_out: Sequences | None
    probes: dict[tuple[str, int, float], Probe]

    @classmethod
    def make(
        cls, run: TrainingRun, context: Context, engine: Engine, split: Strategy, data: Opened
    ) -> Evaluation:
        """Raises DataError for a probe that does not fit its length."""
        held_out = data.held_out if run.eval.sequences else None
        probes = make_probes(run.eval, run.seq_len, run.seed, data)
        return cls(run, context, engine, split, held_out, probes)

    def run(self, step: int, go_on: Callable[[], bool]) -> dict[str, Any] | None:
        """The line of eval.jsonl, the same on all ranks. ``go_on()`` is asked before each batch;
        None once it says no."""
        self.engine.train(False)
        result: dict[str, Any] | None = {"step": step}
        try:
            with torch.no_grad():
                if self.held_out is not None:
                    result |= self._loss(go_on)
                if self.probes:
                    result["probes"] = self._accuracies(go_on)
        except _Interrupted:
            result = None
        self.engine.train(True)
        return result

    def _loss(self, go_on: Callable[[], bool]) -> dict[str, Any]:
        """Loss and perplexity of held-out tokens, and the loss of those at positions below 1, 2,
        4, 8...: if more context helps, it falls."""
        size = 2 + max(1, self.training.seq_len - 1).bit_length()
        sums = torch.zeros(2, size, dtype=torch.float64)  # loss, tokens
        for numbers in self._rounds(self.training.eval.sequences, go_on):
            batch = load_batch(
                self.training.attention, self.training.model.layers, self.held_out, self.context,
                self.split, numbers,
            )  # fmt: skip
            attend = self.context.attend(batch.plans)
            _, each, *_ = self.engine.forward(batch.tokens, batch.positions, attend, batch.labels)
            own = torch.from_numpy(batch.plans.layout.positions(self.context.cp_rank))
            number = torch.tensor(numbers)[own // self.training.seq_len]
            supervised = (batch.labels != IGNORED)[0].cpu()
            supervised &= number < self.training.eval.sequences  # not what fills up a round
            # frexp's exponent: 0 for position 0, 1 for 1, 2 for 2 and 3, ...
            bucket = torch.frexp(batch.positions.cpu()[supervised].double())[1].long()
            sums[0].index_add_(0, bucket, each[0].cpu()[supervised].double())
            sums[1].index_add_(0, bucket, torch.ones(len(bucket), dtype=torch.float64))
        totals = torch.tensor(self.context.total(*sums.flatten().tolist())).view_as(sums)
        loss = float(totals[0].sum() / totals[1].sum().clamp(min=1))
        by_position = [
            {"below": 2**i, "loss": float(total / count), "tokens": int(count)}
            for i, (total, count) in enumerate(totals.T)
            if count
        ]
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700)),
            "tokens": int(totals[1].sum()),
            "loss_by_position": by_position,
        }

    def _accuracies(self, go_on: Callable[[], bool]) -> list[dict[str, Any]]:
        """Of passkey: the share of samples with every token of the key right; of recall: the share
        of queries."""
        cells = []
        for (task, length, depth), probe in self.probes.items():
            samples = self.training.eval.samples
            # Per sample, tokens that are right and tokens that are asked for.
            counts = torch.zeros(2, samples + self.context.dp * self.training.batch_size)
            for numbers in self._rounds(samples, go_on):
                batch = load_batch(
                    self.training.attention, self.training.model.layers, probe, self.context,
                    self.split, numbers,
                )  # fmt: skip
                attend = self.context.attend(batch.plans)
                _, _, right, *_ = self.engine.forward(
                    batch.tokens, batch.positions, attend, batch.labels
                )
                own = torch.from_numpy(batch.plans.layout.positions(self.context.cp_rank))
                sample = torch.tensor(numbers)[own // length]
                asked = (batch.labels != IGNORED)[0].cpu()
                counts[0].index_add_(0, sample, (right[0].cpu() & asked).float())
                counts[1].index_add_(0, sample, asked.float())
            totals = torch.tensor(self.context.total(*counts.flatten().tolist())).view_as(counts)
            right, asked = totals[:, :samples]
            if task == "passkey":
                accuracy = float((right == asked).float().mean())
            else:
                accuracy = float(right.sum() / asked.sum())
            cells.append({"task": task, "length": length, "depth": depth, "accuracy": accuracy})
        return cells

    def _rounds(self, count: int, go_on: Callable[[], bool]) -> Iterator[list[int]]:
        """The sequences of this rank's data coordinate, a batch at a time: all coordinates have
        as many batches, as sharded weights need; what is then too much is other sequences."""
        size = self.training.batch_size
        per_round = size * self.context.dp
        first = self.context.dp_rank * size
        for start in range(0, count, per_round):
            if not go_on():
                raise _Interrupted
            yield list(range(start + first, start + first + size))


class _Interrupted(Exception):
    """Somebody wants the run to end."""


def make_probes(
    keys: Eval, seq_len: int, seed: int, data: Opened
) -> dict[tuple[str, int, float], Probe]:
    """Raises DataError for a probe that does not fit its length."""
    return {
        (task, length, depth): Probe(task, data.tokenizer, length, seed, depth)
        for task in keys.probes
        for length in keys.lengths or [seq_len]
        for depth in keys.depths
    }


def summary(values: dict[str, Any]) -> str:
    """The line for people."""
    parts = []
    if "loss" in values:
        parts.append(f"held-out loss {values['loss']:.4f} (perplexity {values['perplexity']:.2f})")
    cells = values.get("probes", [])
    for task in dict.fromkeys(cell["task"] for cell in cells):
        accuracies = [cell["accuracy"] for cell in cells if cell["task"] == task]
        parts.append(
            f"{task} {sum(accuracies) / len(accuracies):.1%} (worst cell {min(accuracies):.1%})"
        )
    return f"evaluation at step {values['step']}: " + ", ".join(parts)
