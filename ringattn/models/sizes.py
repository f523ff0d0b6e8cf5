"""Sizes of a decoder, without torch."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ringattn.models.key_sets import KeySets
from ringattn.models.mixer_config import Mixer
from ringattn.models.rope_config import RopeConfig
from ringattn.typed import Count, Flag, Positive, Text, Words, settings


@settings
class ModelConfig:
    """Sizes of a decoder as in Llama, Mistral, Qwen 2 and 3, Gemma 2 and 3, Olmo 3."""

    dim: Count
    """Width of the hidden states."""
    layers: Count
    """Blocks of attention and feed-forward."""
    heads: Count
    """Query heads."""
    kv_heads: Count
    """Key and value heads; each serves heads / kv_heads query heads."""
    ffn_dim: Count
    """Width of the feed-forward."""
    vocab_size: Count
    """Tokens that the model knows; at least those of the tokenizer."""
    head_dim: Count
    """Width of a head."""
    norm_eps: Positive = 1e-5
    """Epsilon of RMSNorm."""
    tied: Flag = True
    """The head's weights are the embedding's."""
    qkv_bias: Flag = False
    """Biases of q, k and v: Qwen 2's."""
    qk_norm: Flag = False
    """RMSNorm over each head of q and k: Qwen 3's, Gemma 3's."""
    qk_norm_whole: Flag = False
    """RMSNorm over all heads of q and of k: Olmo's."""
    norms: Literal["pre", "sandwich", "post"] = "pre"
    """Before attention and feed-forward (Llama), before and after (Gemma), or after (Olmo)."""
    norm_offset: Flag = False
    """Norms multiply by 1 + weight: Gemma's."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    """Of the feed-forward's gate; gelu_tanh: Gemma's."""
    embed_scale: Flag = False
    """Embeddings are multiplied by the square root of their width: Gemma's."""
    scale: Positive | None = None
    """Of attention's scores; null: 1 / sqrt(head_dim)."""
    softcap: Positive | None = None
    """Scores are cap * tanh(scores / cap): Gemma 2's."""
    logit_softcap: Positive | None = None
    """Logits too."""
    sinks: Flag = False
    """Each head has one more key, without a value, whose logit is learned: gpt-oss's."""
    rope: RopeConfig = Field(default_factory=RopeConfig)
    rope_kinds: Annotated[
        dict[Text, RopeConfig] | None,
        Words("null or a mapping of kinds of layer to RoPE keys, as {local:{theta:10000.0}}"),
    ] = None
    """RoPE of kinds of layer where it is not model.rope: {local:{theta:10000.0}}."""

    @model_validator(mode="after")
    def _fits(self) -> ModelConfig:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"model.kv_heads must divide model.heads={self.heads}, got {self.kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim must be even for RoPE, got {self.head_dim}")
        if self.qk_norm and self.qk_norm_whole:
            raise ValueError(
                "model.qk_norm is over each head, model.qk_norm_whole over all: give one"
            )
        return self

    def rope_of(self, kind: str) -> RopeConfig:
        """That of a kind of layer."""
        return (self.rope_kinds or {}).get(kind, self.rope)

    def mixer_of(self, kind: str) -> Mixer | None:
        """What a kind of layer has in place of attention; None: it attends."""
        return None

    def sets_of(self, kind: str) -> KeySets | None:
        """The sets of keys that a kind of layer attends; None: those of a mask."""
        return None

    @property
    def mixed(self) -> dict[Mixer, int]:
        """How many layers have which mixer in place of attention."""
        return {}

    @property
    def choosing(self) -> dict[KeySets, int]:
        """How many layers attend which sets of keys."""
        return {}

    @property
    def attending(self) -> int:
        """Layers with attention."""
        return self.layers - sum(self.mixed.values())

    @property
    def block_norms(self) -> int:
        """RMSNorms of the model's width in a block."""
        return 4 if self.norms == "sandwich" else 2

    @property
    def matmul_parameters(self) -> int:
        """Parameters that multiply every token: with the head, without the embedding look-up."""
        attention = 2 * self.dim * self.head_dim * (self.heads + self.kv_heads)
        mixers = sum(n * mixer.matmul_parameters(self.dim) for mixer, n in self.mixed.items())
        mixers += sum(n * sets.matmul_parameters(self) for sets, n in self.choosing.items())
        ffn = self.layers * 3 * self.dim * self.ffn_dim
        return self.attending * attention + mixers + ffn + self.dim * self.vocab_size

    @property
    def trained(self) -> int:
        """Those that are trained: all."""
        return self.parameters

    @property
    def parameters(self) -> int:
        """All parameters."""
        extra = 0 if self.tied else self.dim * self.vocab_size
        per_layer = self.heads if self.sinks else 0
        per_layer += self.head_dim * (self.heads + self.kv_heads) if self.qk_norm_whole else 0
        per_layer += self.head_dim * (self.heads + 2 * self.kv_heads) if self.qkv_bias else 0
        per_layer += 2 * self.head_dim if self.qk_norm else 0
        extra += (self.block_norms * self.layers + 1) * self.dim + self.attending * per_layer
        for mixer, n in self.mixed.items():
            extra += n * (mixer.parameters(self.dim) - mixer.matmul_parameters(self.dim))
        for sets, n in self.choosing.items():
            extra += n * (sets.parameters(self) - sets.matmul_parameters(self))
        return self.matmul_parameters + extra


@settings
class MixedConfig(ModelConfig):
    """A decoder of which some layers carry a state in place of attention, or attend sets of keys
    that are chosen or summarised."""

    kinds: tuple[Text, ...]
    """That of each layer."""
    mixers: dict[Text, Mixer | KeySets]
    """By kind, all sizes known; other kinds attend."""

    def mixer_of(self, kind: str) -> Mixer | None:
        """What a kind of layer has in place of attention; None: it attends."""
        mixer = self.mixers.get(kind)
        return mixer if isinstance(mixer, Mixer) else None

    def sets_of(self, kind: str) -> KeySets | None:
        """The sets of keys that a kind of layer attends; None: those of a mask."""
        mixer = self.mixers.get(kind)
        return mixer if isinstance(mixer, KeySets) else None

    @property
    def mixed(self) -> dict[Mixer, int]:
        """How many layers have which mixer in place of attention."""
        each = Counter(map(self.mixer_of, self.kinds))
        return {mixer: count for mixer, count in each.items() if mixer}

    @property
    def choosing(self) -> dict[KeySets, int]:
        """How many layers attend which sets of keys."""
        each = Counter(map(self.sets_of, self.kinds))
        return {sets: count for sets, count in each.items() if sets}
