"""Sizes of a decoder, without torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from ringattn.models.rope_config import RopeConfig


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a decoder. ``qkv_bias`` is Qwen 2's, ``qk_norm`` (RMSNorm over each head of q and
    k) Qwen 3's. Raises ValueError, naming the key, for sizes that do not fit.
    """

    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn_dim: int
    vocab_size: int
    head_dim: int
    norm_eps: float = 1e-5
    tied: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    rope: RopeConfig = field(default_factory=RopeConfig)

    def __post_init__(self) -> None:
        for key in ("dim", "layers", "heads", "kv_heads", "ffn_dim", "vocab_size", "head_dim"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key} must be at least 1, got {getattr(self, key)}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"model.kv_heads must divide model.heads={self.heads}, got {self.kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim must be even for RoPE, got {self.head_dim}")

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
