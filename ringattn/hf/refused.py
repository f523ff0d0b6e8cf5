"""What a trainer with split sequences does not do: each with its reason, before data is read."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from ringattn.hf.kinds import text_config
from ringattn.hf.planner import Split

_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")


def check_model(model: nn.Module) -> None:
    """Raises ValueError for a model that is not made with our attention, or drops some of it."""
    config = text_config(model)
    for settings in getattr(model, "peft_config", {}).values():
        check_adapter(settings)
    for name in _DROPOUTS:
        if getattr(config, name, 0):
            raise ValueError(
                f"{name}={getattr(config, name)}: attention over split sequences has no dropout; "
                f"set {name}=0 in the model's config"
            )


def check_adapter(settings: Any) -> None:
    """Raises ValueError for adapters that put tokens of their own before the others."""
    if getattr(settings, "is_prompt_learning", False):
        raise ValueError(
            f"{type(settings).__name__} puts tokens of its own before a sequence, which no plan "
            "has: take adapters of weights (LoRA)"
        )


def check_arguments(args: Any, given: dict[str, Any], split: Split) -> None:
    """Raises ValueError for arguments of a trainer (``args``, and those it is ``given`` beside)
    that split sequences would make wrong, or that say the same as ``split``."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if split.cp < 1 or world % split.cp:
        raise ValueError(
            f"cp={split.cp} must divide the {world} ranks"
            + ("" if world > 1 else "; start the script with torchrun or accelerate launch")
        )
    if given.get("compute_loss_func") is not None:
        raise ValueError(
            "compute_loss_func is given labels that are not shifted and all logits; override "
            "compute_loss, and take log-probabilities of ringattn.hf.token_logprobs"
        )
    check_adapter(given.get("peft_config"))
    if args is None:
        return
    accelerator = args.accelerator_config
    names = ("activation_checkpointing", "gradient_checkpointing")
    own = getattr(args, "activation_checkpointing_kwargs", None) or {}
    checkpointing = any(getattr(args, name, False) for name in names)
    refused = {
        "label_smoothing_factor": (args.label_smoothing_factor, "needs logits of all tokens"),
        "neftune_noise_alpha": (
            args.neftune_noise_alpha, "noise is scaled by the tokens that a rank has"
        ),
        "dispatch_batches": (
            accelerator.dispatch_batches, "ranks of one sequence must read the same batch"
        ),
        "split_batches": (accelerator.split_batches, "a batch would be cut between its rows"),
        "eval_use_gather_object": (
            args.eval_use_gather_object, "ranks of one sequence have the same samples"
        ),
        "torch_compile": (
            args.torch_compile and checkpointing and split.keep_attention,
            "it does not see into checkpointing that keeps attention; set "
            "activation_checkpointing=False, or Split(keep_attention=False)",
        ),
        "checkpointing's own settings": (
            checkpointing and split.keep_attention and sorted({*own} - {"every_n_layers",
                                                                        "use_reentrant"}),
            "checkpointing that keeps attention has none of them; set Split(keep_attention=False), "
            "or Split(offload=True) for offload",
        ),
        "precompute_ref_log_probs": (
            getattr(args, "precompute_ref_log_probs", False),
            "it calls the model before sequences are split",
        ),
        "batch_eval_metrics": (
            args.batch_eval_metrics and world > split.cp,
            "data ranks end at unequal batches",
        ),
        "average_tokens_across_devices=False": (
            not args.average_tokens_across_devices and world > 1,
            "the loss is the mean over the tokens of all ranks",
        ),
        "train_sampling_strategy='batch_rebalance'": (
            args.train_sampling_strategy == "batch_rebalance",
            "Split(balance=True) balances by attention's work, over data ranks",
        ),
    }  # fmt: skip
    for name, (value, reason) in refused.items():
        if value:
            shown = name if "=" in name else f"{name}={value}"
            raise ValueError(f"{shown} does not go with split sequences: {reason}")
    if args.n_gpu > 1:
        raise ValueError(f"{args.n_gpu} GPUs in one process: start one process for each (torchrun)")
    parallel = getattr(args, "parallelism_config", None)
    for name in ("cp_size", "sp_size", "tp_size"):
        if parallel is not None and getattr(parallel, name, 1) > 1:
            raise ValueError(
                f"parallelism_config has {name}={getattr(parallel, name)}: sequences are split by "
                "Split(cp=...) alone"
            )
    # Iterable datasets would be read by one process for all.
    accelerator.dispatch_batches = False


def check_lengths(dataset: Any, longest: int, packing: str | None) -> None:
    """Raises ValueError where TRL would cut samples of ``dataset`` (token ids) to ``longest``
    tokens and drop the rest, as it does without packing, and with "bfd"."""
    columns = getattr(dataset, "column_names", None)
    if packing not in (None, "bfd") or not columns or not hasattr(dataset, "__len__"):
        return

    def lengths(name: str) -> list[int]:
        known = name in columns
        return [len(x) for x in dataset.select_columns([name])[name]] if known else []

    answers = zip(lengths("chosen_ids"), lengths("rejected_ids"), strict=True)
    pairs = zip(lengths("prompt_ids"), answers, strict=False)
    each = lengths("input_ids") or [prompt + max(answer) for prompt, answer in pairs]
    if cut := sum(n > longest for n in each):
        raise ValueError(
            f"{cut} of {len(each)} samples are longer than max_length={longest} (the longest has "
            f"{max(each)} tokens), and would lose what is beyond; set max_length to at least that, "
            "or cut them yourself (packing_strategy='bfd_split' or 'wrapped' goes on in the next "
            "row)"
        )
