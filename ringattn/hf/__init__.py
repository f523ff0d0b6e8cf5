"""Unchanged Hugging Face models on split sequences: ``attn_implementation="ringattn"``.

Importing this registers with transformers' AttentionInterface. In a loop of one's own:

>>> plans = ringattn.hf.make_plans(model, ringattn.masks.documents(lengths), layout)
>>> batch = ringattn.hf.local_batch(plans, rank, input_ids)
>>> with ringattn.hf.split_sequence(model, plans, group):
...     model(**batch, num_items_in_batch=count).loss.backward()

In a trainer of transformers or TRL:

>>> class LongSFTTrainer(ringattn.hf.SplitSequences, trl.SFTTrainer): ...
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ringattn.hf.attention import NAME
from ringattn.hf.batch import local_batch
from ringattn.hf.compiled import compile_layers
from ringattn.hf.coverage import NotCovered
from ringattn.hf.inside import whole_sequences
from ringattn.hf.kinds import make_plans
from ringattn.hf.logprobs import token_logprobs
from ringattn.hf.planner import Split
from ringattn.hf.split import check, split_sequence

if TYPE_CHECKING:
    from ringattn.hf.trainer import SplitSequences

__all__ = [
    "NAME", "NotCovered", "Split", "SplitSequences", "check", "compile_layers", "local_batch",
    "make_plans", "split_sequence", "token_logprobs", "whole_sequences",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # transformers' Trainer takes seconds to import, which a loop of one's own does not need.
    if name == "SplitSequences":
        return import_module("ringattn.hf.trainer").SplitSequences
    raise AttributeError(f"module 'ringattn.hf' has no attribute {name!r}")
