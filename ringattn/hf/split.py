"""``split_sequence``: a model of transformers, unchanged, on this rank's tokens of split sequences.

Everything hangs on the model for that time, as attributes and hooks of its modules, so that nothing
is patched and a recomputation in the backward, on whatever thread, finds it too. Before the first
forward the model is probed, its layers' masks are compared with the plans, and a short sequence is
computed both ways.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from transformers import PreTrainedModel

from ringattn.execution.carriers import connect
from ringattn.hf import agree, router
from ringattn.hf.attention import HERE, ActiveSplit, Layer
from ringattn.hf.batch import lengths_of
from ringattn.hf.coverage import NotCovered, language_model, probe, takes
from ringattn.hf.gathered import found_in, install_found, probe_gathering, remove_found
from ringattn.hf.head import Scored
from ringattn.hf.inputs import by_name, check_inputs, check_names, digest
from ringattn.hf.inside import installed
from ringattn.hf.kinds import assign, check_segments, text_config
from ringattn.hf.mixers import follow_backward
from ringattn.hf.proof import compare
from ringattn.planning.layer_plans import LayerPlans
from ringattn.planning.plan import Plan

# What probes have seen, by the names of what the model was called with: its loss is looked at too.
_LAYERS: WeakKeyDictionary[nn.Module, dict[tuple[frozenset[str], bool], dict[nn.Module, Layer]]]
_LAYERS = WeakKeyDictionary()
_PROVEN: WeakSet[nn.Module] = WeakSet()


@contextmanager
def split_sequence(
    model: nn.Module,
    plans: Plan | Mapping[str, Plan],
    group: Any = None,
    kernel: str = "auto",
    check: bool = True,
    mixers: str = "refuse",
) -> Iterator[None]:
    """Inside, ``model`` (a transformers model made with ``attn_implementation="ringattn"``, or what
    wraps one) sees this rank's tokens of sequences split as ``plans`` say over ``group`` (None: the
    default one), with the block ``kernel`` of :func:`ringattn.ring_attention`. Forward and backward
    belong inside.

    ``plans``: of :func:`ringattn.hf.make_plans`, or any mapping of kinds of layer to plans of one
    layout; each layer finds its own. Or one plan for all layers.

    Before its first forward the model is probed on a few tokens (see :mod:`ringattn.hf.coverage`);
    before the first forward of every plan the masks of its layers are compared with the plans', in
    both directions; and before the first one with gradient, unless ``check`` is False, a short
    sequence is computed both ways (see :mod:`ringattn.hf.proof`).

    A module that mixes tokens in a way that is not covered is refused; with ``mixers="gather"`` it
    is computed on whole documents on every rank, exact, in the time and memory of the whole
    sequence (see :mod:`ringattn.hf.gathered`).

    Raises RuntimeError if the model is inside one already. The model's forward raises, on all
    ranks, ValueError: for a model that is not covered (:class:`NotCovered`), for a plan that is not
    a layer's own, and for inputs that are not this rank's part of one batch: see
    :func:`local_batch`.
    """
    inside = language_model(model)
    split = make_split(plans, group, kernel, mixers)
    before = partial(_called, check=check)
    handles = [
        inside.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
        inside.register_forward_hook(after_call),
    ]
    try:
        with inside_of(inside, split):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def inside_of(model: PreTrainedModel, split: ActiveSplit) -> Iterator[None]:
    """:func:`split_sequence` without its hooks: calls of ``model`` are to be put between
    :func:`before_call` and :func:`after_call`.

    Raises RuntimeError if the model is inside one already, ValueError for a layout without segments
    where layers have a state.
    """
    check_segments(model, split.plans)
    if hasattr(model, HERE):
        raise RuntimeError("split_sequence: this model already has a plan")
    handles = [
        h for module in filter(follows_length, model.modules()) for h in follow_length(module)
    ]
    handles.append(model.base_model.register_forward_hook(_keep_router_logits))
    if split.gather:
        install_found(model)
    try:
        with installed(model, split):
            yield
    finally:
        for handle in handles:
            handle.remove()
        if split.gather:
            remove_found(model)


def check(
    model: nn.Module,
    plans: Plan | Mapping[str, Plan],
    group: Any = None,
    mixers: str = "refuse",
) -> None:
    """Proves that ``model`` on split sequences is the model of one process. Collective over
    ``group``.

    It is probed for modules that mix tokens by themselves, its layers' masks are compared with the
    plans' in both directions, and the beginning of the sequence is computed split and in one
    process: see :func:`ringattn.hf.proof.compare`. ``mixers`` as in :func:`split_sequence`.

    Raises ValueError, with the module or the token.
    """
    inside = language_model(model)
    ids = torch.zeros(1, 1, dtype=torch.long, device=next(inside.parameters()).device)
    inputs = {"input_ids": ids, "position_ids": ids}
    with split_sequence(model, plans, group, check=False, mixers=mixers):
        _assign(inside, inputs)
        compare(inside, inputs)


def make_split(
    plans: Plan | Mapping[str, Plan], group: Any, kernel: str, mixers: str = "refuse"
) -> ActiveSplit:
    """Raises ValueError where the plans do not fit each other."""
    if mixers not in ("refuse", "gather"):
        raise ValueError(f'mixers must be "refuse" or "gather", got {mixers!r}')
    mapping: Any = {None: plans} if isinstance(plans, Plan) else plans
    if (
        not isinstance(mapping, Mapping)
        or not mapping
        or not all(isinstance(plan, Plan) for plan in mapping.values())
    ):
        raise ValueError(f"plans must be a plan or a mapping of kinds to plans, got {plans!r}")
    layout = LayerPlans(mapping).layout
    if empty := [rank for rank in layout.ranks if not layout.count(rank)]:
        raise ValueError(f"ranks {empty} have no token: transformers models need one on every rank")
    own: Any = mapping  # itself: LayerPlans know more than a mapping
    return ActiveSplit(own, group, kernel, lengths_of(plans), gather=mixers == "gather")


def _called(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], check: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (), before_call(model, by_name(model, args, kwargs), check)


def before_call(model: PreTrainedModel, bound: dict[str, Any], check: bool) -> dict[str, Any]:
    """Before every forward of the transformers model: looks at what reaches it, by name, with the
    other ranks, and drops what says nothing (a mask of ones, and a cache that nobody reads); before
    the first one, what can be wrong with model and plans."""
    split: ActiveSplit = getattr(model, HERE)
    if takes(model, "use_cache"):
        bound["use_cache"] = False
    if split.probe is not None:
        check_names(bound)
    if split.probe is not None or split.checking:
        return bound
    _together(split, lambda: check_inputs(split, model, bound), _alike(model, bound))
    if isinstance(bound.get("attention_mask"), torch.Tensor):
        bound["attention_mask"] = None
    _assign(model, bound)
    # Ranks agree on whether there are gradients, so on this too.
    proven = not check or split.any.world == 1 or model in _PROVEN
    if not proven and torch.is_grad_enabled() and compare(model, bound):
        _PROVEN.add(model)
    return bound


def _alike(model: nn.Module, bound: dict[str, Any]) -> list[int]:
    """Numbers that must be the same on all ranks: which gradients are wanted first."""
    wants = [p.requires_grad for p in model.parameters()] if torch.is_grad_enabled() else []
    wants.append(any(getattr(x, "requires_grad", False) for x in bound.values()))
    trained = sum(number for number, wanted in enumerate(wants, 1) if wanted)
    return [trained, *digest(bound)]


def _assign(model: nn.Module, bound: dict[str, Any]) -> None:
    """Every attention layer gets its plan; the model is probed if it has not been called so."""
    split: ActiveSplit = getattr(model, HERE)
    names = frozenset(name for name, x in bound.items() if x is not None), split.gather
    known = _LAYERS.setdefault(model, {})
    if split.of and names in known:
        return

    def find() -> None:
        config = text_config(model)
        if names not in known:
            search: Any = probe_gathering if split.gather else probe
            known[names] = search(model, bound)
        parameters = inspect.signature(model.forward).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if "position_ids" not in parameters and not open_ended:
            raise NotCovered(
                f"{type(model).__name__} takes no position_ids: it would count this rank's tokens "
                "from 0"
            )
        split.of = assign(split, known[names], config)

    _together(split, find)


def _together(
    split: ActiveSplit, action: Callable[[], None], alike: Sequence[int] = (0, 0, 0)
) -> None:
    """Raises what ``action`` raises on all ranks, since one that went on would wait for those that
    do not; and if they do not give the same numbers (see :func:`_alike`)."""
    error: Exception | None = None
    try:
        action()
    except Exception as caught:
        error = caught
    comm = connect(split.group)
    everyone = agree.gather(comm, torch.tensor([int(error is not None), *alike]))
    refused, trained, *others = everyone.T
    if refused.any():
        reasons = agree.words(comm, "" if error is None else str(error))
        if error is not None:
            raise error
        rank = int(refused.argmax())
        raise ValueError(f"rank {rank} of the sequence: {reasons[rank]}")
    if (trained != trained[0]).any():
        none = (trained == 0).nonzero()[:, 0].tolist()
        raise ValueError(
            "ranks of one sequence must want the same gradients: "
            + (f"ranks {none} want none" if none else "requires_grad differs from rank to rank")
        )
    for name, values in zip(("sequences in the batch", "num_items_in_batch"), others, strict=True):
        if (values != values[0]).any():
            raise ValueError(
                f"ranks of one sequence must have the same {name}, and have {values.tolist()}"
                + ("; it counts the tokens of all ranks" if name.startswith("num") else "")
            )


def _keep_router_logits(body: nn.Module, args: tuple[Any, ...], out: Any) -> None:
    """Outputs of others than transformers (TRL's) have a router loss without them."""
    split: ActiveSplit = getattr(body, HERE)
    split.router_logits = getattr(out, "router_logits", None)


def after_call(model: PreTrainedModel, args: tuple[Any, ...], out: Any) -> None:
    """After every forward: the router loss becomes that of all ranks' tokens."""
    split: ActiveSplit = getattr(model, HERE)
    if split.probe is None and not split.checking:
        follow_backward(model, split, out, partial(found_in, model))
    whole = split.probe is not None or split.checking or split.any.world == 1
    logits, split.router_logits = split.router_logits, None
    has_share = isinstance(out, Scored)
    if not whole and not has_share and isinstance(getattr(out, "aux_loss", None), torch.Tensor):
        router.over_all_tokens(model, out, logits, connect(split.group))


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
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Adds the last position of the longest document to those of this rank."""
    split: ActiveSplit = getattr(module, HERE)

    def longer(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, torch.full_like(x[..., :1], max(split.lengths, default=1) - 1)], -1)

    if split.probe is not None or split.whole:
        return args, kwargs
    if "position_ids" in kwargs:
        return args, {**kwargs, "position_ids": longer(kwargs["position_ids"])}
    return (args[0], longer(args[1]), *args[2:]), kwargs


def _without_last_position(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
    split: ActiveSplit = getattr(module, HERE)
    if split.probe is not None or split.whole:
        return None
    return tuple(x[..., :-1, :] for x in out) if isinstance(out, tuple) else out[..., :-1, :]
