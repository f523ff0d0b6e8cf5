"""Unchanged Hugging Face models on split sequences: ``attn_implementation="ringattn"``.

Importing this registers with transformers' AttentionInterface.

>>> plans = ringattn.hf.make_plans(model, ringattn.masks.documents(lengths), layout)
>>> batch = ringattn.hf.local_batch(plans, rank, input_ids)
>>> with ringattn.hf.split_sequence(model, plans, group):
...     model(**batch, num_items_in_batch=count).loss.backward()
"""

from ringattn.hf.attention import NAME
from ringattn.hf.batch import local_batch
from ringattn.hf.coverage import NotCovered
from ringattn.hf.kinds import make_plans
from ringattn.hf.split import check, split_sequence

__all__ = [
    "NAME", "NotCovered", "check", "local_batch", "make_plans", "split_sequence",
]  # fmt: skip
