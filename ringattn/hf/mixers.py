"""Layers of transformers with a state along the sequence, or a short convolution, on split
sequences: their modules stay what they are, with their own weights and gates.

Whatever such a module does along the sequence it leaves to a handful of functions of its file
(``causal_conv1d_fn``, ``torch_chunk_gated_delta_rule``...). Inside of a split the instance's
methods run with others in their place, which compute the same on segments; nothing of the file or
the class is changed, and afterwards the instance has its own methods back. That the result is the
module's is proved on a short sequence before the first step (:mod:`ringattn.hf.proof`); and what
mixes tokens besides is found by the probe (:mod:`ringattn.hf.coverage`).
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from transformers.activations import ACT2FN

from ringattn.execution.carriers import VirtualRank, VirtualWorld
from ringattn.hf.attention import HERE, ActiveSplit
from ringattn.mixers import conv, delta, linear, scan
from ringattn.planning import layouts
from ringattn.planning.segments import Segments

Where = Callable[[int], dict[str, Any]]  # segments= and group= for so many tokens of this rank


def _convolution(
    where: Where,
    hidden_states: torch.Tensor,  # [batch, channels, tokens]
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    x = hidden_states.mT.to(weight.dtype)
    out = conv(x, weight, bias, **where(x.shape[1])).mT
    out = out if activation is None else ACT2FN[activation](out)
    return out.to(hidden_states.dtype)


def _delta(
    where: Where,
    query: torch.Tensor,  # [batch, tokens, heads, dk]; there may be more heads of value
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    chunk_size: int = 64,
    use_qk_l2norm_in_kernel: bool = False,
    output_final_state: bool = False,
) -> tuple[torch.Tensor, None]:
    q, k = (_repeated(x.float(), value.shape[2]) for x in (query, key))
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    out = delta(q, k, value, beta.float(), g.float(), **where(q.shape[1]))
    return out.to(query.dtype), None


def _ssd(
    where: Where,
    hidden_states: torch.Tensor,  # [batch, tokens, heads, head_dim]
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,  # [batch, tokens, groups, state], as C
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
) -> torch.Tensor:
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = torch.clamp(F.softplus(dt) if dt_softplus else dt, *dt_limit).float()
    x, heads = hidden_states.float(), hidden_states.shape[2]
    q, k = (_repeated(each.float(), heads) for each in (C, B))
    out = linear(q, k, x * dt[..., None], A.float() * dt, scale=1.0, **where(x.shape[1]))
    return out if D is None else out + D[..., None] * x


def _selective_scan(
    where: Where,
    hidden_states: torch.Tensor,  # [batch, channels, tokens], as dt and z
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,  # [batch, state, tokens], as C
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    use_mambapy: bool = False,
    use_associative_scan: bool = False,
) -> torch.Tensor:
    dt = dt if delta_bias is None else dt + delta_bias.to(dt.dtype)[..., None]
    dt = F.softplus(dt) if delta_softplus else dt
    x = hidden_states.float()
    given = (x.mT, dt.float().mT, A.float(), B.float().mT, C.float().mT)
    out = scan(*given, **where(x.shape[2])).mT
    out = out if D is None else out + x * D[:, None]
    out = out.to(hidden_states.dtype)
    return out if z is None else out * F.silu(z)


def _not_fused(where: Where, **_: Any) -> None:
    """Where kernels would do all at once: transformers then takes the steps one by one."""


# By their names in the files of transformers.
FUNCTIONS = {
    "causal_conv1d_fn": _convolution,
    "torch_chunk_gated_delta_rule": _delta,
    "chunk_kimi_delta_attention": _delta,
    "mamba2_chunk_scan": _ssd,
    "mamba_selective_scan": _selective_scan,
    "mamba2_split_conv1d_scan_combined": _not_fused,
    "mamba_inner_fn": _not_fused,
}


def _lightning(
    module: nn.Module,
    hidden_states: torch.Tensor,
    position_embeddings: Any = None,
    attention_mask: torch.Tensor | None = None,
    cache: Any = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    split: ActiveSplit | None = getattr(module, HERE, None)
    if split is None or split.whole:
        given = (hidden_states, position_embeddings, attention_mask, cache)
        return type(module).forward(module, *given, **more)
    check_recomputed(module, split)
    sizes = {"heads": module.num_attention_heads, "head_dim": module.head_dim}
    if _recorded(split, "lightning", sizes):
        raise _Heard
    if cache is not None:
        raise ValueError(f"{type(module).__name__}: cached decoding is not covered")
    shape = (*hidden_states.shape[:2], module.num_attention_heads, 3 * module.head_dim)
    qkv = module.act_fn(module.qkv_proj(hidden_states)).view(shape)
    q, k, v = qkv.split(module.head_dim, -1)
    decay, where = -module.slope_rate.flatten().float(), _where(split, shape[1])
    out = linear(q, k, v, decay, scale=1.0, **where)
    out = module.norm(out.flatten(2))
    return module.out_proj(torch.sigmoid(module.output_gate(hidden_states)) * out), None


# Forwards by the names of their classes, where a file has no function for what they do.
METHODS = {"MiniMaxLightningAttention": _lightning}


def _repeated(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Heads that serve several others each."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


def exchange(model: nn.Module) -> list[Callable[[], None]]:
    """Lets the modules of ``model`` that leave what they do along the sequence to known functions
    compute it on segments, while they are inside of a split; what is to be called afterwards."""
    undo = []
    for module, name, function in _methods_of(model):
        if name in module.__dict__ and not hasattr(module.__dict__[name], "closed"):
            continue  # somebody else's: the probe then finds what it does
        if function in METHODS.values():
            module.__dict__[name] = MethodType(function, module)
        else:
            module.__dict__[name] = MethodType(_copied(module, function), module)
        undo.append(lambda module=module, name=name: module.__dict__.pop(name, None))
    return undo


def _copied(module: nn.Module, function: FunctionType) -> FunctionType:
    """The function with others in place of those that it calls."""
    world = function.__globals__
    mine = {key: _on_segments(module, key, world[key]) for key in _used(function)}
    copied = FunctionType(
        function.__code__,
        world | mine,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


class _Heard(Exception):
    """A probe has heard what it wanted to."""


def _recorded(split: ActiveSplit, name: str, given: dict[str, Any]) -> bool:
    """Whether a probe writes calls down, and has now."""
    if split.probe is None or split.probe.calls is None:
        return False
    split.probe.calls.append((name, given))
    return True


def has_mixers(model: nn.Module) -> bool:
    """Whether any module of the model is computed on segments."""
    return next(_methods_of(model), None) is not None


def calls_attention(module: nn.Module) -> bool:
    """Whether a method of its class calls transformers' attention interface."""
    return _attends(type(module))


@cache
def _attends(kind: type[nn.Module]) -> bool:
    functions = (
        inspect.unwrap(value)
        for base in kind.__mro__
        for value in vars(base).values()
        if callable(value)
    )
    return any(
        "ALL_ATTENTION_FUNCTIONS" in f.__code__.co_names
        for f in functions
        if isinstance(f, FunctionType)
    )


def _methods_of(model: nn.Module) -> Iterator[tuple[nn.Module, str, FunctionType]]:
    for module in model.modules():
        for name, function in _methods(type(module)).items():
            yield module, name, function


@cache
def _methods(kind: type[nn.Module]) -> dict[str, FunctionType]:
    """The methods that call such functions, without what is wrapped around them; or what stands in
    for them."""
    found: dict[str, FunctionType] = {}
    if any(base.__name__ in METHODS for base in kind.__mro__):
        return {"forward": next(METHODS[b.__name__] for b in kind.__mro__ if b.__name__ in METHODS)}
    for base in reversed(kind.__mro__):
        if base is nn.Module or not issubclass(base, nn.Module):
            continue
        for name, value in vars(base).items():
            function = inspect.unwrap(value) if callable(value) else value
            if isinstance(function, FunctionType) and name != "__init__":
                found.pop(name, None)
                if _used(function):
                    found[name] = function
    return found


def _used(function: FunctionType) -> list[str]:
    names = set(function.__code__.co_names) & set(FUNCTIONS) & set(function.__globals__)
    return sorted(names)


def _on_segments(module: nn.Module, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """In place of a function of transformers, for one module."""
    signature, handler = inspect.signature(original), FUNCTIONS[name]
    known = inspect.signature(handler).parameters

    def on_segments(*args: Any, **kwargs: Any) -> Any:
        split: ActiveSplit | None = getattr(module, HERE, None)
        if split is None or split.whole:
            return original(*args, **kwargs)
        check_recomputed(module, split)
        bound = signature.bind(*args, **kwargs).arguments
        for extra in [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]:
            more = bound.pop(extra, {})
            if any(more.get(key) is not None for key in ("cu_seqlens", "seq_idx", "cu_seq_lens_q")):
                raise ValueError(
                    f"{type(module).__name__}: packed documents were told again; the plan has them"
                )
        if handler is not _not_fused:
            given = {key: x for key, x in bound.items() if x is not None}
            if strange := sorted(set(given) - set(known)):
                raise ValueError(
                    f"{type(module).__name__} gives {name} {', '.join(strange)}, which is not "
                    "covered on split sequences (cached decoding is not)"
                )
            if given.get("output_final_state") or given.get("return_final_states"):
                raise ValueError(f"{type(module).__name__}: cached decoding is not covered")
            bound = given
            if _recorded(split, name, bound):
                if handler is not _convolution:
                    raise _Heard
                return bound["hidden_states"]
        return handler(partial(_where, split), **bound)

    return on_segments


# The splits of the forwards whose gradients have arrived, by torch's number of a running backward.
_RUNNING: dict[int, list[ActiveSplit]] = {}


def follow_backward(
    model: nn.Module, split: ActiveSplit, out: Any, more: Callable[[], Iterable[nn.Module]]
) -> None:
    """Of a forward inside of ``split`` that gave ``out``: lets :func:`check_recomputed` know when
    its backward runs. ``more``: modules beside those of :func:`exchange` that must not be computed
    again after the split."""
    if not torch.is_grad_enabled():
        return
    known = weakref.ref(model)

    def arrived(_: torch.Tensor) -> None:
        task = torch._C._current_graph_task_id()
        splits = _RUNNING.setdefault(task, [])
        if any(one is split for one in splits):
            return
        finish = torch.autograd.Variable._execution_engine.queue_callback
        if not splits:
            finish(lambda: _RUNNING.pop(task, None))
        splits.append(split)
        inside = known()
        if inside is not None and not hasattr(inside, HERE):
            undo = [_closed(module) for module in {*modules_with_mixers(inside), *more()}]
            finish(lambda: [action() for action in undo])

    for x in tree_leaves(opened(out)):
        if isinstance(x, torch.Tensor) and x.requires_grad:
            x.register_hook(arrived)


def _closed(module: nn.Module) -> Callable[[], None]:
    """Until the action that is returned the module is not to be computed in a backward. (An error
    there keeps the action from being called: nothing else may change.)"""

    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch._C._current_graph_task_id() == -1:
            return type(module).forward(module, *args, **kwargs)
        raise RuntimeError(_LATE.format(type(module).__name__))

    if "forward" in module.__dict__:
        return lambda: None
    forward.closed = True
    module.__dict__["forward"] = forward
    return lambda: module.__dict__.pop("forward", None)


def modules_with_mixers(model: nn.Module) -> list[nn.Module]:
    """Those that are computed on segments."""
    return list(dict.fromkeys(module for module, _, _ in _methods_of(model)))


def opened(tree: Any) -> Any:
    """Outputs of transformers are mappings that torch's trees may not know."""
    if isinstance(tree, dict):
        return [opened(x) for x in tree.values()]
    return [opened(x) for x in tree] if isinstance(tree, (tuple, list)) else tree


_LATE = (
    "{} is computed again in a backward (gradient checkpointing) that is not that of a forward of "
    "this split_sequence: the backward of a forward belongs inside its own, before the next one"
)


def check_recomputed(module: nn.Module, split: ActiveSplit) -> None:
    """Raises RuntimeError where a module is computed again in a backward that is not, or not alone,
    that of a forward inside of ``split``."""
    task = torch._C._current_graph_task_id()
    if task == -1 or split.probe is not None or split.attends is not None:
        return
    running = _RUNNING.get(task, [])
    if len(running) != 1 or running[0] is not split:
        raise RuntimeError(_LATE.format(type(module).__name__))


def _where(split: ActiveSplit, tokens: int) -> dict[str, Any]:
    if split.probe is None:
        return {"segments": split.segments, "group": split.group}
    alone = Segments(layouts.contiguous(tokens, 1), [1] * tokens)  # every token a document
    return {"segments": alone, "group": VirtualRank(VirtualWorld(1), 0)}
