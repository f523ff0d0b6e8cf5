"""A plug-in for axolotl, whose trainer then splits sequences as ours do::

    plugins: [ringattn.hf.axolotl.RingattnPlugin]
    ringattn: {cp: 4, layout: balanced, schedule: auto}   # the arguments of ringattn.hf.Split

Attention is ours for the model and nothing else is patched; axolotl's own ``context_parallel_size``
stays 1. Rows are packed by ``batch_flattening: true``, or by ``sample_packing: true`` with
``sample_packing_drop_attention_mask: true``, by which documents are told by positions alone.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from ringattn.hf.attention import NAME
from ringattn.hf.planner import Split
from ringattn.hf.trainer import SplitSequences


class RingattnArgs(BaseModel):
    """The key that the plug-in adds to axolotl's."""

    ringattn: dict[str, Any] | None = None


class RingattnPlugin(BasePlugin):
    """Splits sequences where axolotl's configuration has ``ringattn``."""

    def get_input_args(self) -> str:
        return f"{__name__}.RingattnArgs"

    def post_model_build(self, cfg: Any, model: Any) -> None:
        if cfg.ringattn:
            if (cfg.context_parallel_size or 1) > 1:
                raise ValueError("context_parallel_size: sequences are split by ringattn.cp alone")
            model.set_attn_implementation(NAME)

    def get_trainer_cls(self, cfg: Any) -> type | None:
        if not cfg.ringattn:
            return None
        from axolotl.core.trainers.base import AxolotlTrainer  # here: it loads all of axolotl

        split = Split(**cfg.ringattn)

        class SplitAxolotlTrainer(SplitSequences, AxolotlTrainer):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, split=split, **kwargs)

        return SplitAxolotlTrainer
