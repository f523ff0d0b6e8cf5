"""A model inside of a split: what its modules find on themselves for that time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ringattn.hf.attention import HERE, Split
from ringattn.hf.mixers import exchange


@contextmanager
def installed(model: nn.Module, split: Split) -> Iterator[None]:
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
