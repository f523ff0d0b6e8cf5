"""Which samples a data rank reads: the ranks of one sequence the same, others others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from ringattn.batches import IGNORED
from ringattn.hf.whole import documents_of
from ringattn.planning.balancing import deal


def pack(samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """A collator: samples (``input_ids``, and ``labels`` if not all tokens are supervised) end to
    end in one row, with positions from 0 in each document. A sample may hold several documents, by
    its ``seq_lengths`` or its ``position_ids``.

    Raises ValueError for samples that hold anything else, padding among it.
    """
    row: dict[str, list[int]] = {"input_ids": [], "position_ids": [], "labels": []}
    for sample in samples:
        mask = sample.get("attention_mask")
        strange = sorted(set(sample) - {*row, "seq_lengths", "attention_mask"})
        if strange or (mask is not None and not all(int(one) == 1 for one in mask)):
            raise ValueError(
                "samples that are packed hold input_ids, labels, position_ids and seq_lengths; "
                + (f"these have {', '.join(strange)}" if strange else "these are padded")
                + "; give a data_collator"
            )
        ids = [int(token) for token in sample["input_ids"]]
        positions = sample.get("position_ids")
        if positions is None:
            lengths = sample.get("seq_lengths")
            lengths = [len(ids)] if lengths is None else lengths
            positions = [at for length in lengths for at in range(int(length))]
        labels = sample.get("labels")
        labels = [int(label) for label in (ids if labels is None else labels)]
        for name, x in (("input_ids", ids), ("position_ids", positions), ("labels", labels)):
            if len(x) != len(ids):
                raise ValueError(f"a sample has {len(ids)} input_ids and {len(x)} {name}")
            row[name] += [int(each) for each in x]
    return {name: torch.tensor(x)[None] for name, x in row.items()}


class TellsDocuments:
    """A collator, and what samples say by ``seq_lengths`` of their documents: its batches must say
    the same. Raises ValueError where they do not."""

    def __init__(self, collate: Callable[..., Any], unpad: bool) -> None:
        self.collate, self.unpad = collate, unpad

    def __call__(self, samples: Sequence[Any]) -> Any:
        told = [x.get("seq_lengths") if isinstance(x, Mapping) else None for x in samples]
        want = [int(n) for each in told if each is not None for n in each if n]
        batch = self.collate(samples)
        if want:
            found = list(documents_of(batch, self.unpad).lengths)
            if found != want:
                raise ValueError(
                    f"samples hold documents of seq_lengths={want[:6]}, and the collator makes "
                    f"{found[:6]} of them: documents would see each other; use the default "
                    "collator (ringattn.hf.batches.pack), or one that gives position_ids from 0 "
                    "in each document"
                )
        return batch


class Streamed(IterableDataset):
    """A streamed dataset that accelerate does not know how to cut by its own files."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        return iter(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)


def share(loader: DataLoader, dp: int, dp_rank: int, world: int, even: bool) -> None:
    """Lets a loader that accelerate prepared for ``world`` processes read for ``dp`` data ranks.
    ``even``: the last batches are filled up, with samples from the beginning, where ranks would
    have unequal numbers of them.

    Raises ValueError for a loader that accelerate reads in one process for all.
    """
    if world == 1:
        return
    for shard in (loader.batch_sampler, loader.dataset):
        if isinstance(shard, (BatchSamplerShard, IterableDatasetShard)) and not shard.split_batches:
            shard.num_processes, shard.process_index = dp, dp_rank
            if isinstance(shard, BatchSamplerShard):
                shard.even_batches = even and dp > 1
            return
    raise ValueError(
        f"accelerate gave a {type(loader).__name__} that is not read by each process for itself: "
        "set dispatch_batches=False and split_batches=False in accelerator_config"
    )


class Dealt(BatchSampler):
    """The batches of a sampler, those of an optimizer step dealt anew by how much work their
    samples are; in the order in which data ranks take turns. ``work``: of a sample, by index."""

    def __init__(
        self, batches: BatchSampler, work: Callable[[int], float], dp: int, micro_steps: int
    ) -> None:
        self.batches, self.work, self.dp, self.micro_steps = batches, work, dp, micro_steps
        self.batch_size, self.drop_last = batches.batch_size, batches.drop_last
        self.sampler = batches.sampler

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int) -> None:
        for inside in (self.batches, self.sampler):
            if hasattr(inside, "set_epoch"):
                inside.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        batches = iter(self.batches)
        while step := list(islice(batches, self.dp * self.micro_steps)):
            full = [batch for batch in step if len(batch) == self.batch_size]
            micro_steps = len(full) // self.dp
            dealt, rest = step[: micro_steps * self.dp], step[micro_steps * self.dp :]
            samples = [index for batch in dealt for index in batch]
            if samples:
                work = [self.work(index) for index in samples]
                for ranks in deal(work, self.dp, micro_steps, self.batch_size):
                    yield from ([samples[number] for number in own] for own in ranks)
            yield from rest


class EvenEvaluation:
    """A loader of samples that are each seen once. Data ranks take as many steps; one that has no
    batch of its own left takes one in which nothing is supervised. ``real``: samples of the
    present batch."""

    def __init__(self, loader: DataLoader, samples: int, size: int, dp: int, dp_rank: int) -> None:
        self.loader, self.samples, self.size = loader, samples, size
        self.dp, self.dp_rank = dp, dp_rank
        self.dataset, self.batch_sampler = loader.dataset, loader.batch_sampler
        self.real = 0

    def __len__(self) -> int:
        return -(-self.samples // (self.size * self.dp))

    def __iter__(self) -> Iterator[Any]:
        batches, last = iter(self.loader), None
        for step in range(len(self)):
            before = (step * self.dp + self.dp_rank) * self.size
            self.real = min(max(self.samples - before, 0), self.size)
            if self.real:
                last = next(batches)
                yield last
            else:
                last = self.loader.collate_fn([self.dataset[0]]) if last is None else last
                yield _without_labels(last)


def _without_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: torch.full_like(x, IGNORED) if name == "labels" else x for name, x in batch.items()
    }
