"""``split_sequence``: a model of transformers, unchanged, on this rank's tokens of split sequences.

Everything hangs on the model for that time, as attributes and hooks of its modules, so that nothing
is patched and a recomputation in the backward, on whatever thread, finds it too. Before the first
forward the model is probed, its layers' masks are compared with the plans, and a short sequence is
computed both ways.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from ringattn.execution.carriers import connect
from ringattn.hf import agree, router
from ringattn.hf.attention import HERE, Layer, Split
from ringattn.hf.batch import lengths_of
from ringattn.hf.coverage import NotCovered, language_model, probe
from ringattn.hf.inputs import check_inputs, check_names
from ringattn.hf.kinds import assign, text_config
from ringattn.hf.proof import compare
from ringattn.planning.plan import Plan

_LAYERS: WeakKeyDictionary[nn.Module, dict[nn.Module, Layer]] = WeakKeyDictionary()  # once probed
_CHECKED: WeakSet[nn.Module] = WeakSet()


@contextmanager
def split_sequence(
    model: nn.Module,
    plans: Plan | Mapping[str, Plan],
    group: Any = None,
    kernel: str = "auto",
    check: bool = True,
) -> Iterator[None]:
    """Inside, ``model`` (a transformers model made with ``attn_implementation="ringattn"``, or what
    wraps one) sees this rank's tokens of sequences split as ``plans`` say over ``group`` (None: the
    default one). Forward and backward belong inside.

    ``plans``: of :func:`ringattn.hf.make_plans`, or any mapping of kinds of layer to plans of one
    layout; each layer finds its own. Or one plan for all layers.

    Before its first forward the model is probed on a few tokens (see :mod:`ringattn.hf.coverage`);
    before the first forward of every plan the masks of its layers are compared with the plans', in
    both directions; and before the first one with gradient, unless ``check`` is False, a short
    sequence is computed both ways (see :mod:`ringattn.hf.proof`).

    Raises RuntimeError if the model is inside one already. The model's forward raises, on all
    ranks, ValueError: for a model that is not covered (:class:`NotCovered`), for a plan that is not
    a layer's own, and for inputs that are not this rank's part of one batch: see
    :func:`local_batch`.
    """
    inside = language_model(model)
    split = make_split(plans, group, kernel)
    if hasattr(model, HERE):
        raise RuntimeError("split_sequence: this model already has a plan")
    modules = list(model.modules())
    for module in modules:
        object.__setattr__(module, HERE, split)
    first = partial(_first, check=check)
    handles = [
        model.register_forward_pre_hook(first, prepend=True, with_kwargs=True),
        inside.register_forward_pre_hook(_inputs, prepend=True, with_kwargs=True),
        inside.register_forward_hook(_router),
    ]
    for module in filter(follows_length, modules):
        handles += follow_length(module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in modules:
            object.__delattr__(module, HERE)


def check(model: nn.Module, plans: Plan | Mapping[str, Plan], group: Any = None) -> None:
    """Proves that ``model`` on split sequences is the model of one process. Collective over
    ``group``.

    It is probed for modules that mix tokens by themselves, its layers' masks are compared with the
    plans' in both directions, and the beginning of the sequence is computed split and in one
    process: see :func:`ringattn.hf.proof.compare`.

    Raises ValueError, with the module or the token.
    """
    ids = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    inputs = {"input_ids": ids, "position_ids": ids}
    with split_sequence(model, plans, group, check=False), torch.no_grad():
        _assign(model, (), inputs)
        compare(model, (), inputs)


def make_split(plans: Plan | Mapping[str, Plan], group: Any, kernel: str) -> Split:
    """Raises ValueError where the plans do not fit each other."""
    mapping = {None: plans} if isinstance(plans, Plan) else plans
    if not mapping or not all(isinstance(plan, Plan) for plan in mapping.values()):
        raise ValueError(f"plans must be a plan or a mapping of kinds to plans, got {plans!r}")
    first = next(iter(mapping.values()))
    for kind, plan in mapping.items():
        if plan.layout is not plan.key_layout and plan.layout != plan.key_layout:
            raise ValueError(f"the plan of {kind} has keys of their own: a model has one sequence")
        if plan.layout != first.layout:
            raise ValueError(f"the plan of {kind} has another layout than the first one")
    return Split(mapping, group, kernel, lengths_of(plans))


def _first(model: nn.Module, args: tuple, kwargs: dict[str, Any], check: bool) -> None:
    """Before the first forward of a plan: what can be wrong with model and plan."""
    split: Split = getattr(model, HERE)
    if split.probe is not None or split.checking:
        return
    inside = language_model(model)
    if not split.of:
        _assign(model, args, kwargs)
    if check and split.any.world > 1 and inside not in _CHECKED and torch.is_grad_enabled():
        compare(model, args, kwargs)
        _CHECKED.add(inside)


def _assign(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Every attention layer gets its plan; the model is probed if it has not been."""
    split: Split = getattr(model, HERE)
    inside = language_model(model)

    def find() -> None:
        config = text_config(inside)
        if inside not in _LAYERS:
            _LAYERS[inside] = probe(model, args, kwargs)
        if "position_ids" not in inspect.signature(inside.forward).parameters:
            raise NotCovered(
                f"{type(inside).__name__} takes no position_ids: it would count this rank's tokens "
                "from 0"
            )
        assign(split, _LAYERS[inside], config)

    _together(split, find)


def _together(split: Split, action: Callable[[], None], agreed: int = 0) -> None:
    """Raises what ``action`` raises on all ranks, since one that went on would wait for those that
    do not; and if they do not give the same number ``agreed``."""
    error: Exception | None = None
    try:
        action()
    except Exception as caught:
        error = caught
    comm = connect(split.group)
    everyone = agree.gather(comm, torch.tensor([int(error is not None), agreed]))
    refused, numbers = everyone.T
    if refused.any():
        reasons = agree.words(comm, "" if error is None else str(error))
        if error is not None:
            raise error
        rank = int(refused.argmax())
        raise ValueError(f"rank {rank} of the sequence: {reasons[rank]}")
    if (numbers != numbers[0]).any():
        none = (numbers == 0).nonzero()[:, 0].tolist()
        raise ValueError(
            "ranks of one sequence must want the same gradients: "
            + (f"ranks {none} want none" if none else "requires_grad differs from rank to rank")
        )


def _inputs(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Looks at what reaches the model, with the other ranks, and drops what says nothing: a mask of
    ones, and a cache that nobody reads."""
    split: Split = getattr(model, HERE)
    if "use_cache" in inspect.signature(model.forward).parameters:
        kwargs = {**kwargs, "use_cache": False}
    if split.probe is not None:
        check_names(model, args, kwargs)
    elif not split.checking:
        wants = [p.requires_grad for p in model.parameters()] if torch.is_grad_enabled() else []
        wants.append(any(getattr(x, "requires_grad", False) for x in kwargs.values()))
        trained = sum(number for number, wanted in enumerate(wants, 1) if wanted)
        _together(split, lambda: check_inputs(split, model, args, kwargs), trained)
        if isinstance(kwargs.get("attention_mask"), torch.Tensor):
            kwargs = {**kwargs, "attention_mask": None}
    return args, kwargs


def _router(model: nn.Module, args: tuple, out: Any) -> None:
    split: Split = getattr(model, HERE)
    whole = split.probe is not None or split.checking or split.any.world == 1
    if not whole and isinstance(getattr(out, "aux_loss", None), torch.Tensor):
        router.over_all_tokens(model, out, connect(split.group))


def follow_length(module: nn.Module) -> list[Any]:
    """Lets a rotary embedding see the last position of the sequence: the handles of its hooks."""
    before = module.register_forward_pre_hook(_with_last_position, with_kwargs=True)
    return [before, module.register_forward_hook(_without_last_position)]


def follows_length(module: nn.Module) -> bool:
    """Whether a rotary embedding depends on the largest position that it is given (dynamic NTK,
    longrope), which on a shard is not that of the sequence."""
    kinds = getattr(module, "rope_type", None)
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(
        isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in kinds
    )


def _with_last_position(
    module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Adds the last position of the longest document to those of this rank."""
    split: Split = getattr(module, HERE)

    def longer(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, torch.full_like(x[..., :1], max(split.lengths, default=1) - 1)], -1)

    if split.probe is not None or split.whole:
        return args, kwargs
    if "position_ids" in kwargs:
        return args, {**kwargs, "position_ids": longer(kwargs["position_ids"])}
    return (args[0], longer(args[1]), *args[2:]), kwargs


def _without_last_position(module: nn.Module, args: tuple, out: Any) -> Any:
    split: Split = getattr(module, HERE)
    if split.probe is not None or split.whole:
        return None
    return tuple(x[..., :-1, :] for x in out) if isinstance(out, tuple) else out[..., :-1, :]
