"""``attn_implementation="ringattn"``: what transformers calls in place of its own attention and
masks.

A model of transformers describes the mask of each layer as a function of (query, key). Here no mask
is ever made of it: layers are handed the function itself, a :class:`LayerMask`, which says what the
layer would do in one process. The plan, which says what it does here, belongs to the module (see
:mod:`ringattn.hf.split`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ringattn.execution.attention import ring_attention
from ringattn.execution.carriers import connect
from ringattn.make import make_segments
from ringattn.planning import masks
from ringattn.planning.plan import Plan
from ringattn.planning.segments import Segments

NAME = "ringattn"
HERE = "_ringattn_split"  # on every module of a model that is inside split_sequence

Attend = Callable[..., torch.Tensor]
Allowed = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (queries, keys) -> bool


class LayerMask:
    """Who attends whom in a layer, by transformers' own function of positions. Not a tensor: code
    that would compute with it gets an error."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        self.function = function
        self.split: ActiveSplit | None = None  # of the forward that it was made in

    def __call__(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros_like(queries)
        return torch.as_tensor(self.function(zero, zero, queries, keys)).expand(queries.shape)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"attention_mask.{name}: {_COMPUTES}")

    def _computed(self, *_: Any) -> Any:
        raise TypeError(_COMPUTES)

    __add__ = __radd__ = __sub__ = __mul__ = __rmul__ = __getitem__ = __invert__ = _computed
    __and__ = __rand__ = __or__ = __ror__ = _computed


_COMPUTES = (
    "with ringattn layers get no tensor of a mask, and this model computes with one by itself "
    "(ALiBi, or attention of its own), which is not covered"
)


@dataclass
class Layer:
    """What a probe has seen of one attention layer: its name, its own mask, and its layer_idx."""

    name: str
    allowed: Allowed
    index: int | None


@dataclass
class Probe:
    """While it runs every token attends itself only; layers are written down. With ``calls`` what a
    module hands to the functions of a mixer is written there, and its state is not computed."""

    names: dict[nn.Module, str]
    layers: dict[nn.Module, Layer] = field(default_factory=dict)
    calls: list[tuple[str, dict[str, Any]]] | None = None


@dataclass(eq=False)
class ActiveSplit:
    """What a model's modules know of the split while they are inside split_sequence."""

    plans: dict[str | None, Plan]  # None: one plan for all
    group: Any
    kernel: str
    lengths: list[int]  # of the packed documents
    of: dict[nn.Module, Plan] = field(default_factory=dict)  # each attention layer's own
    probe: Probe | None = None
    attends: Mapping[str, Attend] | None = None  # in a training run: by kind, in place of ``of``
    kinds: Sequence[str] = ()  # of the layers of such a run, by layer_idx
    checking: bool = False  # a proof runs: inputs are its own
    whole: bool = False  # of whole sequences, by transformers' attention
    along: Segments | None = None  # those of such a run, where its layers carry states
    gather: bool = False  # modules that mix tokens by themselves are computed on whole documents
    router_logits: Sequence[torch.Tensor] | None = None  # of the forward that runs

    @cached_property
    def rank(self) -> int:
        return connect(self.group).rank

    def attend(self, module: nn.Module) -> Attend:
        """Attention as this layer's plan says."""
        if self.attends is not None:
            return self.attends[self.kinds[module.layer_idx]]
        if module not in self.of:
            name = type(module).__name__
            raise RuntimeError(f"{name} was not reached when the model was probed: it has no plan")
        return partial(ring_attention, plan=self.of[module], group=self.group, kernel=self.kernel)

    @cached_property
    def segments(self) -> Segments:
        """What layers with a state along the sequence go by."""
        return self.along or make_segments(masks.documents(self.lengths), self.any.layout)

    @property
    def any(self) -> Plan:
        """All plans share layout and ranks."""
        return next(iter(self.plans.values()))

    @cached_property
    def positions(self) -> torch.Tensor:
        """int64 ``[local tokens]``: where this rank's tokens stand in the whole sequence."""
        return torch.from_numpy(self.any.layout.positions(self.rank))


# What transformers passes along that says nothing new: the plan and the local batch have it.
_KNOWN = {"position_ids", "cache_position", "position_embeddings", "indices", "labels",
"shift_labels",
          "num_items_in_batch"}  # fmt: skip


@torch.compiler.disable  # plans are data: a graph would be one for each of them
def _attention(
    module: nn.Module,
    query: torch.Tensor,  # [batch, heads, local tokens, head_dim], as key and value
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: LayerMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    split: ActiveSplit | None = getattr(module, HERE, None)
    if split is None:
        raise RuntimeError(
            'attn_implementation="ringattn" needs a plan: call the model inside '
            "`with ringattn.hf.split_sequence(model, plan, group):`, or, to generate and for whole "
            "sequences in this process, inside `with ringattn.hf.whole_sequences(model):`"
        )
    name = type(module).__name__
    if dropout:
        raise ValueError(f"attention_dropout={dropout}: ringattn has none; set it to 0")
    if attention_mask is not None and not isinstance(attention_mask, LayerMask):
        raise ValueError("an attention_mask was given; with ringattn the plan's mask is the mask")
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"{name}: {query.shape[2]} queries and {key.shape[2]} keys: cross attention and cached "
            "decoding are not covered"
        )
    for what, x in more.items():
        if isinstance(x, torch.Tensor) and what not in _KNOWN:
            raise ValueError(
                f"{name} gives its attention {what}, which ringattn has not: a bias is lost"
            )
    if split.probe is not None:
        return _alone(split.probe, module, query, value, attention_mask, sliding_window), None
    if attention_mask is not None:
        if attention_mask.split not in (None, split):
            raise RuntimeError(
                f"{name} is computed again with the plan of a later forward: the backward of a "
                "forward belongs inside its own split_sequence, before the next one"
            )
        attention_mask.split = split
    query = _scaled_by_position(module, split, query)
    kind = query.device.type
    # Under autocast RoPE leaves q and k in float32 and v is half, as transformers' kernels expect.
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    q, k, v = (x.transpose(1, 2).to(dtype) for x in (query, key, value))
    attend = split.attend(module)
    return attend(q, k, v, scale=scaling, softcap=softcap, sinks=s_aux), None


def _alone(
    probe: Probe,
    module: nn.Module,
    query: torch.Tensor,
    value: torch.Tensor,
    mask: LayerMask | None,
    window: int | None,
) -> torch.Tensor:
    """Attention in which every token attends itself."""
    causal = getattr(module, "is_causal", True)

    def plain(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        seen = keys <= queries if causal else torch.ones_like(queries, dtype=torch.bool)
        return seen if window is None else seen & ((queries - keys).abs() < window)

    index = getattr(module, "layer_idx", None)
    probe.layers[module] = Layer(probe.names[module], plain if mask is None else mask, index)
    return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous()


def _scaled_by_position(module: nn.Module, split: ActiveSplit, query: torch.Tensor) -> torch.Tensor:
    """Llama 4 scales the queries of layers without RoPE by ``1 + a log(1 + floor((i + 1) / f))`` at
    index i (Nakanishi 2025, arXiv 2501.19399), and counts i on the tokens that it sees: here on its
    shard."""
    if not getattr(module, "attn_temperature_tuning", False) or getattr(module, "use_rope", True):
        return query

    def scales(index: torch.Tensor) -> torch.Tensor:
        steps = torch.floor((index.float() + 1) / module.floor_scale)
        return 1 + module.attn_scale * torch.log1p(steps)

    true = split.positions.to(query.device)
    ratio = scales(true) / scales(torch.arange(len(true), device=query.device))
    return (query * ratio[:, None]).to(query.dtype)


def _mask(
    *_: Any,
    mask_function: Callable[..., torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    **__: Any,
) -> LayerMask:
    """In place of a mask of [tokens, tokens]; one that pads is refused, not lost."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError(PADDED)
    return LayerMask(mask_function)


PADDED = (
    "attention_mask has zeros; with ringattn the plan's mask is the mask: pack documents "
    "(masks.documents(lengths)) instead of padding them"
)

AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
