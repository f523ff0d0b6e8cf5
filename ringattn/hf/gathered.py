"""``mixers="gather"``: a module that mixes tokens in a way of its own, computed on whole documents.

Every rank gathers what goes into such a module from all ranks, computes it document by document as
one process does, and keeps its own tokens: exact for any module, at the price of the whole
sequence's time and memory on every rank. Which modules these are the probe finds
(:mod:`ringattn.hf.coverage`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedModel

from ringattn.execution.carriers import Comm, connect
from ringattn.hf import agree
from ringattn.hf.attention import HERE, ActiveSplit, Layer
from ringattn.hf.coverage import TOKENS, Mixes, NotCovered, probe
from ringattn.hf.mixers import calls_attention, check_recomputed
from ringattn.planning.layouts import Layout

_ROUNDS = 16  # of the probe: each finds the innermost modules that are left

# By model: the modules that were found, and which of their arguments have an axis of tokens.
_FOUND: WeakKeyDictionary[nn.Module, WeakKeyDictionary[nn.Module, list[bool]]]
_FOUND = WeakKeyDictionary()


def probe_gathering(model: PreTrainedModel, kwargs: dict[str, Any]) -> dict[nn.Module, Layer]:
    """:func:`ringattn.hf.coverage.probe`, and every module that mixes tokens by itself is computed
    on whole documents from here on.

    Raises NotCovered where that is no module of its own (the model, or what attention is in), or
    what goes in and out of it has no axis of tokens.
    """
    found = _FOUND.setdefault(model, WeakKeyDictionary())
    for _ in range(_ROUNDS):
        try:
            return probe(model, kwargs, without_attention=bool(found))
        except Mixes as error:
            paths = error.paths
            inner = [p for p in paths if not any(q.startswith(f"{p}.") for q in paths)]
            for path in inner:
                module = model.get_submodule(path)
                whole = not path or any(map(calls_attention, module.modules()))
                if whole or module in found:
                    raise
                for other in module.modules():
                    found.pop(other, None)
                    other.__dict__.pop("forward", None)
                found[module] = []
                install(module, found[module])
    raise NotCovered(f"{type(model).__name__}: modules that mix tokens are left after {_ROUNDS} "
                     "rounds of gathering")  # fmt: skip


def found_in(model: nn.Module) -> list[nn.Module]:
    """The modules of ``model`` that a probe has found."""
    return list(_FOUND.get(model, {}))


def install_found(model: nn.Module) -> None:
    """Lets the modules that a probe has found in ``model`` compute on whole documents again."""
    for module, tokens in _FOUND.get(model, {}).items():
        install(module, tokens)


def remove_found(model: nn.Module) -> None:
    """The modules compute as they are."""
    for module in _FOUND.get(model, {}):
        module.__dict__.pop("forward", None)


def install(module: nn.Module, has_tokens: list[bool]) -> None:
    """``has_tokens``: of the leaves of the module's arguments; filled by the first call, which is
    one of a probe."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        split: ActiveSplit | None = getattr(module, HERE, None)
        original = type(module).forward
        if split is None or split.whole:
            return original(module, *args, **kwargs)
        leaves, tree = tree_flatten((args, kwargs))
        if split.probe is not None:
            has_tokens[:] = [_by_token(module, x) for x in leaves]
            pairs = zip(has_tokens, leaves, strict=True)
            each = [x.movedim(1, 0) if own else x for own, x in pairs]  # a batch of single tokens
            return _map(_call(original, module, each, tree), module, lambda x: x.movedim(0, 1))
        check_recomputed(module, split)
        if len(leaves) != len(has_tokens):
            raise ValueError(f"{type(module).__name__} is called otherwise than when it was probed")
        comm, layout = connect(split.group), split.any.layout
        whole = [
            _Whole.apply(x, layout, comm) if own else x
            for own, x in zip(has_tokens, leaves, strict=True)
        ]
        outs, at = [], 0
        for length in split.lengths:
            part = slice(at, at := at + length)
            own = [x[:, part] if own else x for own, x in zip(has_tokens, whole, strict=True)]
            outs.append(_call(original, module, own, tree))
        flat = [tree_flatten(out)[0] for out in outs]
        joined = [
            torch.cat(parts, 1) if _is_tensor(parts[0]) else parts[0]
            for parts in zip(*flat, strict=True)
        ]
        out = tree_unflatten(joined, tree_flatten(outs[0])[1])
        return _map(out, module, lambda x: x[:, split.positions.to(x.device)])

    module.__dict__["forward"] = forward


def _call(original: Callable[..., Any], module: nn.Module, leaves: list[Any], tree: Any) -> Any:
    args, kwargs = tree_unflatten(leaves, tree)
    return original(module, *args, **kwargs)


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


def _by_token(module: nn.Module, x: Any) -> bool:
    """Whether an argument of a probe has an axis of tokens. Raises NotCovered for a tensor that has
    none at its second place."""
    if not _is_tensor(x) or x.dim() == 0:
        return False
    if x.dim() < 2 or x.shape[1] != TOKENS or x.shape[0] != 1:
        raise NotCovered(
            f"{type(module).__name__} cannot be gathered: it takes a tensor of {list(x.shape)}, "
            f"whose second axis is not that of the {TOKENS} tokens"
        )
    return True


def _map(out: Any, module: nn.Module, change: Callable[..., torch.Tensor]) -> Any:
    leaves, tree = tree_flatten(out)
    if any(x is not None and not _is_tensor(x) for x in leaves):
        raise NotCovered(f"{type(module).__name__} cannot be gathered: it gives more than tensors")
    return tree_unflatten([x if x is None else change(x) for x in leaves], tree)


class _Whole(torch.autograd.Function):
    """The whole sequence ``[batch, tokens, ...]`` on every rank; the gradients of a rank's tokens
    are summed over the ranks, in their order."""

    @staticmethod
    def forward(ctx, x, layout: Layout, comm: Comm):
        ctx.layout, ctx.comm = layout, comm
        return agree.whole(comm, layout, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        layout, comm = ctx.layout, ctx.comm
        own = layout.shard(grad, comm.rank).contiguous()
        parts = [torch.empty_like(own) for _ in layout.ranks]
        parts[comm.rank] = own
        others = [rank for rank in layout.ranks if rank != comm.rank]
        comm.start(
            [(layout.shard(grad, rank).contiguous(), rank) for rank in others],
            [(parts[rank], rank) for rank in others],
            "gradients of a whole sequence",
        ).wait()
        return torch.stack(parts).sum(0), None, None
