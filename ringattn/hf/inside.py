"""A model inside of a split: what its modules find on themselves for that time; and outside of one,
computing as transformers does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ringattn.hf.attention import HERE, NAME, ActiveSplit
from ringattn.hf.mixers import exchange


@contextmanager
def installed(model: nn.Module, split: ActiveSplit) -> Iterator[None]:
    """``split`` on every module of ``model``, and mixers on its segments; what was there before
    comes back afterwards."""
    before = [(module, module.__dict__.get(HERE)) for module in model.modules()]
    for module, _ in before:
        object.__setattr__(module, HERE, split)
    undo = exchange(model)
    try:
        yield
    finally:
        for action in undo:
            action()
        for module, own in before:
            if own is None:
                object.__delattr__(module, HERE)
            else:
                object.__setattr__(module, HERE, own)


@contextmanager
def by_transformers(model: nn.Module, implementation: str) -> Iterator[None]:
    """Attention and masks by transformers' own ``implementation``, where they would be ours."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    texts = [c.get_text_config() for c in configs.values() if hasattr(c, "get_text_config")]
    configs |= {id(c): c for c in texts}
    ours = [c for c in configs.values() if getattr(c, "_attn_implementation", None) == NAME]
    for config in ours:
        config._attn_implementation = implementation
    try:
        yield
    finally:
        for config in ours:
            config._attn_implementation = NAME


@contextmanager
def whole_sequences(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` (made with ``attn_implementation="ringattn"``, or what wraps one) computes
    as transformers does, on whole sequences in this process, its cache included: for ``generate``,
    pipelines, and evaluations of one's own between steps.

    >>> with ringattn.hf.whole_sequences(model):
    ...     model.generate(prompt, max_new_tokens=20)

    Attention is "sdpa" where the model can, else "eager" (softcaps and sinks). Ranks whose weights
    are split (FSDP, ZeRO 3) must call it alike. Raises RuntimeError inside of a split.
    """
    for module in model.modules():
        if hasattr(module, HERE):
            raise RuntimeError("whole_sequences: this model is inside of a split; leave that first")
    text = [
        c.get_text_config()  # type: ignore[union-attr]  # of modules that have a config
        for m in model.modules()
        if hasattr(c := getattr(m, "config", None), "get_text_config")
    ]
    capped = any(getattr(config, "attn_logit_softcapping", None) for config in text)
    fused = all(getattr(m, "_supports_sdpa", True) for m in model.modules())
    with by_transformers(model, "sdpa" if fused and not capped else "eager"):
        yield
