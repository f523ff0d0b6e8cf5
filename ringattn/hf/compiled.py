"""torch.compile for models on split sequences: layer by layer, with attention outside of graphs, so
that nothing is compiled again for another plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

_COMPILED: WeakSet[nn.Module] = WeakSet()


def compile_layers(model: nn.Module, **as_torch_compile: Any) -> None:
    """Compiles the layers of ``model``, in place, each by itself; ``as_torch_compile`` are
    torch.compile's arguments. Where a layer is computed again in the backward (transformers' own
    checkpointing), what is computed is compiled.

    Raises ValueError where no layer is found.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"torch_compile: {type(model).__name__} has no layers of transformers'")
    _COMPILED.update(layers)
    for layer in layers:
        if layer.gradient_checkpointing:
            plain: Any = type(layer).forward
            run = torch.compile(plain.__wrapped__, **as_torch_compile)
            theirs = layer._gradient_checkpointing_func
            layer.__dict__["_gradient_checkpointing_func"] = partial(_checkpointed, theirs, run)
        else:
            layer.__dict__["forward"] = torch.compile(layer.forward, **as_torch_compile)


def _checkpointed(checkpoint: Any, run: Any, function: partial[Any], *args: Any) -> Any:
    return checkpoint(partial(run, *function.args, **function.keywords), *args)


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Inside, what is compiled of ``model`` runs as it is written: for probes, which look into
    modules."""
    if not any(module in _COMPILED for module in model.modules()):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
