"""``SplitSequences``: sequences split over ranks in the Trainer of transformers, and in those of
TRL that are made of it.

>>> class LongSFTTrainer(ringattn.hf.SplitSequences, trl.SFTTrainer): ...
>>> trainer = LongSFTTrainer(model, args, train_dataset=chats, split=ringattn.hf.Split(cp=4))

The trainer stays what it is. What it calls is whole (:mod:`ringattn.hf.whole`), what it reads
follows the mesh (:mod:`ringattn.hf.batches`), and to its own arithmetic the ranks of a sequence are
ranks of tensor parallelism.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import DataCollatorWithPadding, TrainerCallback, default_data_collator
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from ringattn.context import Context
from ringattn.hf.attention import NAME
from ringattn.hf.batches import Dealt, EvenEvaluation, Streamed, TellsDocuments, pack, share
from ringattn.hf.compiled import compile_layers
from ringattn.hf.coverage import language_model
from ringattn.hf.planner import Planner, Split
from ringattn.hf.refused import check_arguments, check_lengths, check_model
from ringattn.hf.whole import Documents, documents_of, supervised, whole_calls
from ringattn.models import recompute
from ringattn.models.memory import Memory
from ringattn.planning.balancing import imbalance

RECORD = "ringattn.json"  # in a checkpoint


class SplitSequences:
    """To be put before a Trainer: ``class LongTrainer(SplitSequences, transformers.Trainer)``.
    Takes what that takes (``args``, ``kwargs``), and ``split``: how (:class:`ringattn.hf.Split`).

    The model is made with ``attn_implementation="ringattn"`` (one that is given by name is).
    Neighbouring ranks share a sequence. Batches, labels, collators, packing, arguments and
    callbacks are as without a split; the numbers that are logged are those of one process, and so
    is what is saved.

    A Trainer that is given no collator packs: :func:`ringattn.hf.batches.pack`.

    Raises ValueError for what is not covered, before data is prepared (a model that is given by
    name is seen after that): see :mod:`ringattn.hf.refused`.
    """

    def __init__(self, *args: Any, split: Split, **kwargs: Any) -> None:
        self.split, self._told = split, False
        self._real: int | None = None  # samples of a batch that is evaluated
        self._work: list[float] = []  # of micro-steps since numbers were logged
        model = kwargs["model"] if "model" in kwargs else args[0] if args else None
        arguments = kwargs["args"] if "args" in kwargs else args[1] if len(args) > 1 else None
        check_arguments(arguments, kwargs, split)
        chosen = kwargs.get("data_collator", args[2] if len(args) > 2 else None) is not None
        if isinstance(model, str) and arguments is not None:
            options = dict(getattr(arguments, "model_init_kwargs", None) or {})
            arguments.model_init_kwargs = {"attn_implementation": NAME} | options
        elif isinstance(model, nn.Module):
            check_model(model)
        super().__init__(*args, **kwargs)
        self.data_collator: Any
        check_model(self.model)
        theirs = type(self.data_collator) is DataCollatorWithPadding
        if not chosen and (theirs or self.data_collator is default_data_collator):
            self.data_collator = pack
        alone = not dist.is_initialized()
        self.context = None if alone else Context.create(split.cp, self.args.device, split.kernel)
        half = self.args.bf16 or self.args.fp16 or language_model(self.model).dtype.itemsize < 4
        self.planner = Planner(self.model, split, 2 if half else 4)
        plugin = self.accelerator.state.dynamo_plugin
        self._compiled = plugin.to_kwargs() if self.args.torch_compile else None
        plugin.backend = DynamoBackend.NO  # accelerate would compile the model as a whole
        self._tp_size = split.cp  # by which TRL divides its count of tokens
        self.add_callback(_Recorded(self))

    # What the trainer is told of the mesh

    def get_tp_size(self) -> int:
        """Ranks that are given the same batch."""
        return self.split.cp

    @property
    def dp(self) -> int:
        return 1 if self.context is None else self.context.dp

    @property
    def dp_rank(self) -> int:
        return 0 if self.context is None else self.context.dp_rank

    @property
    def samples_per_step(self) -> int:
        """Of an optimizer step, over all ranks."""
        return self._train_batch_size * self.args.gradient_accumulation_steps * self.dp

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # accelerate would cut what is gathered as if every process had other samples.
        self.accelerator.gather_for_metrics = self._gather_samples
        self.gather_function = self._gather_samples

    def _gather_samples(self, x: Any, use_gather_object: bool = False) -> Any:
        """Of all samples, each once: of one rank of every sequence. Single values: of all ranks."""
        if isinstance(x, (tuple, list)):
            return type(x)(map(self._gather_samples, x))
        if isinstance(x, dict):
            return {name: self._gather_samples(each) for name, each in x.items()}
        if x.dim() == 0:
            return self.accelerator.gather(x)
        x = x if self._real is None else x[: self._real]
        if self.dp == 1:
            return x
        group, count = self._data_group(), x.new_tensor(len(x), dtype=torch.int64)
        counts = [torch.empty_like(count) for _ in range(self.dp)]
        dist.all_gather(counts, count, group=group)
        kind = torch.uint8 if x.dtype == torch.bool else x.dtype
        padded = x.new_zeros(max(map(int, counts)), *x.shape[1:], dtype=kind)
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)]).to(
            x.dtype
        )

    # Data

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "seq_lengths" not in self._signature_columns:
            self._signature_columns.append("seq_lengths")  # what says where documents begin

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, *args: Any, **kwargs: Any
    ) -> Any:
        training = kwargs.get("is_training", args[1] if len(args) > 1 else False)
        if hasattr(dataset, "n_shards"):
            dataset = Streamed(dataset)
        # Of an evaluation every sample is seen.
        collate, drop_last = self.data_collator, self.args.dataloader_drop_last
        self.data_collator = TellsDocuments(collate, self.split.unpad)
        self.args.dataloader_drop_last = drop_last and training
        try:
            loader = super()._get_dataloader(dataset, description, batch_size, *args, **kwargs)
        finally:
            self.data_collator, self.args.dataloader_drop_last = collate, drop_last
        stream = isinstance(loader.dataset, torch.utils.data.IterableDataset)
        if stream and not training and self.dp > 1:
            raise ValueError(
                "a dataset to evaluate on needs a length where several data ranks share it"
            )
        # Preferences have no labels to leave out: there ranks are filled up, as accelerate does.
        counted = not training and not stream and len(loader.dataset)
        once = bool(counted) and "labels" in loader.collate_fn([loader.dataset[0]])
        share(loader, self.dp, self.dp_rank, self.args.world_size, even=not once)
        if training and self.split.balance and self.dp > 1 and not stream:
            shard, work = loader.batch_sampler, self._work_of(loader.dataset)
            accumulated = self.args.gradient_accumulation_steps
            if work is not None:
                shard.batch_sampler = Dealt(shard.batch_sampler, work, self.dp, accumulated)
        if not once:
            return loader
        even = EvenEvaluation(loader, len(loader.dataset), batch_size, self.dp, self.dp_rank)
        for key, known in getattr(self, "_eval_dataloaders", {}).items():
            if known is loader:  # kept for the next evaluation
                self._eval_dataloaders[key] = even
        return even

    def _work_of(self, dataset: Any) -> Any:
        """FLOPs of a sample, by its index; None where samples do not say how long they are."""
        sample = dataset[0]
        preferences = ("prompt_ids", "chosen_ids", "rejected_ids")
        if not hasattr(sample, "get"):
            return None
        if "input_ids" in sample:
            known = ["seq_lengths"] if "seq_lengths" in sample else ["input_ids"]
        elif all(name in sample for name in preferences):
            known = list(preferences)
        else:
            return None
        if hasattr(dataset, "select_columns"):
            dataset = dataset.select_columns(known)

        @lru_cache(1 << 20)
        def work(index: int) -> float:
            sample = dataset[index]
            if known[0] == "seq_lengths":
                return self.planner.work([int(n) for n in sample["seq_lengths"]])
            first, *more = (len(sample[name]) for name in known)
            return self.planner.work([first + answer for answer in more] or [first])

        return work

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, *more: Any) -> Any:
        """TRL's. What it would cut is seen before it is cut."""
        longest = getattr(args, "max_length", None)
        if longest is None:
            return super()._prepare_dataset(dataset, processing_class, args, *more)
        if not hasattr(args, "packing_strategy"):  # of preferences, which are cut in batches
            dataset = super()._prepare_dataset(dataset, processing_class, args, *more)
            check_lengths(dataset, longest, None)
            return dataset
        packing, *rest = more
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        dataset = super()._prepare_dataset(dataset, processing_class, whole, False, *rest)
        check_lengths(dataset, longest, args.packing_strategy if packing else None)
        return super()._prepare_dataset(dataset, processing_class, args, packing, *rest)

    def _prepared(self, batch: Any) -> Any:
        """A batch with those labels alone that are predicted, so that all count alike."""
        if not self.planner.causal or not hasattr(batch, "get") or batch.get("labels") is None:
            return batch
        if batch.get("shift_labels") is not None:
            return batch
        return {**batch, "labels": supervised(batch["labels"], self._documents(batch))}

    def _documents(self, batch: Any) -> Documents:
        return documents_of(batch, self.split.unpad)

    def get_batch_samples(self, epoch_iterator: Any, *args: Any, **kwargs: Any) -> Any:
        return super().get_batch_samples(map(self._prepared, epoch_iterator), *args, **kwargs)

    # Steps

    @contextmanager
    def _split_calls(self, logits: bool = False) -> Iterator[None]:
        models = (self.model, getattr(self, "ref_model", None))
        split, group = self.split, None if self.context is None else self.context.cp_group
        with ExitStack() as stack:
            for model in (model for model in models if model is not None):
                calls = whole_calls(
                    model, self.planner, group, kernel=split.kernel, mixers=split.mixers,
                    unpad=split.unpad, chunked_loss=split.chunked_loss,
                    loss_chunk=split.loss_chunk, logits=logits,
                )  # fmt: skip
                stack.enter_context(calls)
            yield

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.dp > 1:
            lengths = self._documents(inputs).lengths if "input_ids" in inputs else ()
            self._work.append(self.planner.work(lengths))
        with self._split_calls():
            loss = super().training_step(model, inputs, *args, **kwargs)
        if not self._told and self.is_world_process_zero():
            print(self.planner.told(self.dp), flush=True)
        self._told = True
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if num_items_in_batch is None and inputs.get("labels") is not None:
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
        return super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        self._real = getattr(self.callback_handler.eval_dataloader, "real", None)
        inputs = self._prepared(inputs)
        accumulated = getattr(self, "current_gradient_accumulation_steps", 1)
        self.current_gradient_accumulation_steps = 1  # TRL divides a router loss by it
        try:
            with self._split_calls(logits=not prediction_loss_only):
                loss, logits, labels = super().prediction_step(
                    model, inputs, prediction_loss_only, *args, **kwargs
                )
        finally:
            self.current_gradient_accumulation_steps = accumulated
        loss = None if loss is None else self.accelerator.reduce(loss, "mean")
        return loss, logits, labels

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self._real = None

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # Here transformers has switched checkpointing on, and has wrapped nothing yet.
        if self._compiled is not None:
            compile_layers(self.model, **self._compiled)
        elif self.split.keep_attention:
            memory = Memory(checkpoint=True, offload=self.split.offload)
            for module in self.model.modules():
                if getattr(module, "gradient_checkpointing", False):
                    module._gradient_checkpointing_func = partial(_again, memory)
        return super()._inner_training_loop(*args, **kwargs)

    # Numbers

    def floating_point_ops(self, inputs: Any) -> float:
        return super().floating_point_ops(inputs) / self.split.cp

    def _track_num_input_tokens(self, inputs: Any) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        seen = self.state.num_input_tokens_seen - before
        self.state.num_input_tokens_seen = before + seen // self.split.cp

    def _data_group(self) -> Any:
        assert self.context is not None  # made before the first batch
        return self.context.mesh.get_group("data")

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._work and "loss" in logs:
            own = torch.tensor(self._work, dtype=torch.float64, device=self.args.device)
            everyone = [torch.empty_like(own) for _ in range(self.dp)]
            dist.all_gather(everyone, own, group=self._data_group())
            logs["imbalance"] = imbalance(torch.stack(everyone, 1).cpu().numpy())
        if "loss" in logs:
            self._work.clear()
        super().log(logs, *args, **kwargs)

    # Saving and resuming

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        folder = resume_from_checkpoint
        folder = get_last_checkpoint(self.args.output_dir) if folder is True else folder
        if folder:
            self._check_record(Path(folder))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _check_record(self, folder: Path) -> None:
        """Raises ValueError where an optimizer step has another number of samples than it had: the
        data would continue elsewhere."""
        path = folder / RECORD
        if not path.is_file() or self.args.ignore_data_skip:
            return
        then, now = json.loads(path.read_text())["samples_per_step"], self.samples_per_step
        if self.args.auto_find_batch_size:  # which goes on with the size it had found
            found = json.loads((folder / TRAINER_STATE_NAME).read_text())["train_batch_size"]
            now = now // self._train_batch_size * found
        if then != now:
            raise ValueError(
                f"{folder.name} was saved with {then} samples a step, and now there are {now}: the "
                "data would continue elsewhere. per_device_train_batch_size x "
                f"gradient_accumulation_steps x data ranks must be {then}, or ignore_data_skip=True"
            )


class _Recorded(TrainerCallback):
    """Writes down, beside what is saved, how it was split."""

    def __init__(self, trainer: SplitSequences) -> None:
        self.trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            facts = {
                "samples_per_step": self.trainer.samples_per_step,
                "data_ranks": self.trainer.dp,
                "split": asdict(self.trainer.split),
            }
            (folder / RECORD).write_text(json.dumps(facts, indent=1) + "\n")


def _again(memory: Memory, function: Any, *args: Any) -> Any:
    """In place of transformers' checkpointing: attention is kept."""
    return recompute.keeping(memory, function, *args, draws=True)
