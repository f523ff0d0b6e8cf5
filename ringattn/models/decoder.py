"""A decoder as in Llama, Mistral, Qwen 2 and 3, Gemma 2 and 3, Olmo 3: RMSNorm, RoPE, grouped K/V
heads, gated feed-forward, tied or untied head. Modules and weights have the names of their Hugging
Face checkpoints. Kinds of layer may carry a state in place of attention: see
:mod:`ringattn.models.mixer`.

It knows nothing of ranks: it sees local tokens, their positions, and for each kind of layer a
function ``attend``, or what a state goes by.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from einops import rearrange
from torch import nn

from ringattn.context import Along, Attend, Attends
from ringattn.models import recompute
from ringattn.models.choosing import Choosing
from ringattn.models.key_sets import KeySets
from ringattn.models.loss import capped, chunked_cross_entropy, liger_cross_entropy
from ringattn.models.memory import Memory
from ringattn.models.mixer import initial_mixer_weight, make_mixer
from ringattn.models.mixer_config import Mixer
from ringattn.models.rope import rotate, rotation
from ringattn.models.sizes import MixedConfig, ModelConfig
from ringattn.planning.layer_plans import ONE

# The sum over supervised local tokens, that of each token, and whether its label is the likeliest.
Loss = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class Norm(nn.RMSNorm):
    """RMSNorm that multiplies by 1 + weight, in float32 (Gemma)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = 1 + self.weight.float()
        normed = nn.functional.rms_norm(x.float(), self.normalized_shape, weight, self.eps)
        return normed.type_as(x)


def _norm(config: ModelConfig, width: int) -> nn.RMSNorm:
    return (Norm if config.norm_offset else nn.RMSNorm)(width, config.norm_eps)


class Attention(nn.Module):
    """Over a mask; or with ``sets`` over keys that are chosen or summarised."""

    def __init__(self, config: ModelConfig, sets: KeySets | None = None, number: int = 0) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.options = {"scale": config.scale, "softcap": config.softcap}
        self.options = {name: x for name, x in self.options.items() if x is not None}
        q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, q, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.dim, kv, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.dim, kv, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q, config.dim, bias=False)
        self.whole = config.qk_norm_whole  # all heads are normed together
        widths = (q, kv) if self.whole else (config.head_dim, config.head_dim)
        normed = config.qk_norm or config.qk_norm_whole
        self.q_norm, self.k_norm = (
            _norm(config, width) if normed else nn.Identity() for width in widths
        )
        self.sinks = nn.Parameter(torch.empty(config.heads)) if config.sinks else None
        self.choosing = None if sets is None else Choosing(config, sets, number)

    def forward(
        self, x: torch.Tensor, phases: torch.Tensor, attend: Attend | Along
    ) -> torch.Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.whole:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (rearrange(y, "b t (h d) -> b t h d", d=self.head_dim) for y in (q, k, v))
        if not self.whole:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, phases), rotate(k, phases)
        if self.choosing is not None:
            out = self.choosing(x, q, k, v, attend, **self.options)
        else:
            options = self.options if self.sinks is None else self.options | {"sinks": self.sinks}
            out = attend(q, k, v, **options)
        return self.o_proj(rearrange(out, "b t h d -> b t (h d)"))


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.activation = _ACTIVATIONS[config.activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


_ACTIVATIONS = {
    "silu": nn.functional.silu,
    "gelu_tanh": partial(nn.functional.gelu, approximate="tanh"),
}
# The norms of a block, by where they stand: before and after attention, before and after the
# feed-forward. Checkpoints of different families give the same name to different places.
_NORMS = {
    "pre": ("input_layernorm", None, "post_attention_layernorm", None),
    "sandwich": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "post": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
}


class Block(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        memory: Memory,
        mixer: Mixer | None = None,
        sets: KeySets | None = None,
        number: int = 0,
    ) -> None:
        super().__init__()
        self.memory, self.attends = memory, mixer is None
        self.places = _NORMS[config.norms]
        if self.places[0]:  # parameters in the order in which they are used
            self.add_module(self.places[0], _norm(config, config.dim))
        if mixer is None:
            self.self_attn = Attention(config, sets, number)
        else:
            self.mixer = make_mixer(config, mixer)
        for name in filter(None, self.places[1:]):
            self.add_module(name, _norm(config, config.dim))
        self.mlp = FeedForward(config)

    def forward(
        self, x: torch.Tensor, phases: torch.Tensor | None, attend: Attend | Along
    ) -> torch.Tensor:
        return recompute.block(self.memory, partial(self._compute, phases=phases, attend=attend), x)

    def _compute(
        self, x: torch.Tensor, phases: torch.Tensor | None, attend: Attend | Along
    ) -> torch.Tensor:
        before, after, before_mlp, after_mlp = (
            getattr(self, name) if name else _unchanged for name in self.places
        )
        if self.attends:
            x = x + after(self.self_attn(before(x), phases, attend))
        else:
            x = x + after(self.mixer(before(x), attend))
        return recompute.tiles(self.memory, lambda t: t + after_mlp(self.mlp(before_mlp(t))), x)


def _unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


class Head(nn.Linear):
    """Logits, or with labels the loss; a module, so that engines gather its weight for both."""

    def forward(
        self,
        x: torch.Tensor,
        labels: torch.Tensor | None = None,
        memory: Memory | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor | Loss:
        if labels is None:
            return capped(super().forward(x), softcap)
        memory = memory or Memory()
        if memory.loss == "liger" and torch.is_grad_enabled():
            return liger_cross_entropy(x, self.weight, labels, softcap), None, None
        return chunked_cross_entropy(x, self.weight, labels, memory.loss_chunk, softcap)


class Decoder(nn.Module):
    """``forward(tokens, positions, attend)`` gives logits ``[batch, tokens, vocab]``; with
    ``labels`` (shifted before the split) the loss: its sum over the supervised local tokens and
    that of each token, ``[batch, tokens]``, float32, and under no_grad whether each label is the
    likeliest token (else None). Logits of all tokens then never exist. (Liger's kernels give the
    sum alone.)

    tokens ``[batch, tokens]`` and positions ``[tokens]`` are this rank's own; ``attend`` is
    attention over the whole sequence, of all layers or by kind of layer (see
    :meth:`ringattn.context.Context.attend`).

    ``seed`` None leaves the weights as torch makes them: an engine fills in each rank's own.
    ``kinds``: that of each layer; by default those of a :class:`MixedConfig`, or one.
    """

    def __init__(
        self,
        config: ModelConfig,
        seed: int | None,
        memory: Memory | None = None,
        kinds: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.memory = config, memory or Memory()
        kinds = config.kinds if kinds is None and isinstance(config, MixedConfig) else kinds
        self.kinds = (ONE,) * config.layers if kinds is None else tuple(kinds)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(
            Block(config, self.memory, config.mixer_of(kind), config.sets_of(kind), number)
            for number, kind in enumerate(self.kinds)
        )
        self.norm = _norm(config, config.dim)
        self.lm_head = Head(config.dim, config.vocab_size, bias=False)
        self.tie()
        if seed is not None:
            with torch.no_grad():
                for name, weight in self.named_parameters():
                    weight.copy_(initial_weight(config, seed, name, weight.shape))

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """What engines split one by one."""
        return self.layers

    @property
    def ends(self) -> Sequence[nn.Module]:
        """Embedding and head, if their weights are their own."""
        return () if self.config.tied else (self.embed_tokens, self.lm_head)

    def tie(self) -> None:
        """Makes the head's weight the embedding's, if the model is so configured."""
        if self.config.tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attend: Attends,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor | Loss:
        config = self.config
        phases = {
            kind: rotation(positions, config.head_dim, config.rope_of(kind))
            for kind in dict.fromkeys(self.kinds)
            if config.mixer_of(kind) is None
        }
        x = self.embed_tokens(tokens)
        if config.embed_scale:
            x = x * torch.tensor(config.dim**0.5, dtype=x.dtype)  # rounded as its weights are
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            own = attend[kind] if isinstance(attend, Mapping) else attend
            x = layer(x, phases.get(kind), own)
        return self.lm_head(self.norm(x), labels, self.memory, config.logit_softcap)


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's name and shape; nothing is allocated."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Decoder(config, None).named_parameters()}


def initial_weight(config: ModelConfig, seed: int, name: str, shape: torch.Size) -> torch.Tensor:
    """The first value of a parameter, float32 on the host: a function of seed and name alone, so
    that any rank can make any parameter without making the others.

    Normal with deviation 0.02; projections into the residual stream are scaled down by the square
    root of their number (GPT-2). Norms are 1, biases and sinks 0.
    """
    number = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "little")
    generator = torch.Generator().manual_seed(number)
    if ".mixer." in name and (own := initial_mixer_weight(name, shape, generator)) is not None:
        return own
    if name.endswith(".spans"):  # half of the longest
        return torch.full(shape, 0.5)
    if len(shape) < 2:
        zero = config.norm_offset and not name.endswith("out_norm.weight")
        zero |= name.endswith(("bias", "sinks"))
        return torch.zeros(shape) if zero else torch.ones(shape)
    into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    std = 0.02 / (2 * config.layers) ** 0.5 if into_residual else 0.02
    return torch.empty(shape, device="cpu").normal_(std=std, generator=generator)
