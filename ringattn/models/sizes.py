"""Sizes of a decoder, without torch."""

from __future__ import annotations

from pydantic import Field, model_validator

from ringattn.models.rope_config import RopeConfig
from ringattn.typed import Count, Flag, Positive, settings


@settings
class ModelConfig:
    """Sizes of a decoder as in Llama, Mistral and Qwen 2 and 3."""

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
    """RMSNorm over each head of q and k: Qwen 3's."""
    rope: RopeConfig = Field(default_factory=RopeConfig)

    @model_validator(mode="after")
    def _fits(self) -> ModelConfig:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"model.kv_heads must divide model.heads={self.heads}, got {self.kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim must be even for RoPE, got {self.head_dim}")
        return self

    @property
    def matmul_parameters(self) -> int:
        """Parameters that multiply every token: with the head, without the embedding look-up."""
        attention = 2 * self.dim * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.dim * self.ffn_dim) + self.dim * self.vocab_size

    @property
    def parameters(self) -> int:
        """All parameters."""
        extra = 0 if self.tied else self.dim * self.vocab_size
        per_layer = 2 * self.dim
        per_layer += self.head_dim * (self.heads + 2 * self.kv_heads) if self.qkv_bias else 0
        per_layer += 2 * self.head_dim if self.qk_norm else 0
        return self.matmul_parameters + extra + self.layers * per_layer + self.dim
