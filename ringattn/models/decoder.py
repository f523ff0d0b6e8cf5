"""A Llama-style decoder: RMSNorm, RoPE, grouped K/V heads, SwiGLU, tied or untied head.

It knows nothing of ranks: it sees local tokens, their positions, and a function ``attend``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import nn

from ringattn.context import Attend
from ringattn.models.rope import rotate, rotation


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a decoder. Raises ValueError, naming the key, for sizes that do not fit."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn_dim: int
    vocab_size: int
    head_dim: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied: bool = True

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
        return self.matmul_parameters + extra + (2 * self.layers + 1) * self.dim


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, q, bias=False)
        self.k_proj = nn.Linear(config.dim, kv, bias=False)
        self.v_proj = nn.Linear(config.dim, kv, bias=False)
        self.o_proj = nn.Linear(q, config.dim, bias=False)

    def forward(self, x: torch.Tensor, phases: torch.Tensor, attend: Attend) -> torch.Tensor:
        q, k, v = (
            rearrange(proj(x), "b t (h d) -> b t h d", d=self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = attend(rotate(q, phases), rotate(k, phases), v)
        return self.o_proj(rearrange(out, "b t h d -> b t (h d)"))


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x: torch.Tensor, phases: torch.Tensor, attend: Attend) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), phases, attend)
        return x + self.ffn(self.ffn_norm(x))


class Decoder(nn.Module):
    """``forward(tokens, positions, attend)`` gives logits ``[batch, tokens, vocab]``.

    tokens ``[batch, tokens]`` and positions ``[tokens]`` are this rank's own; ``attend`` is
    attention over the whole sequence (see :meth:`ringattn.context.Context.attend`).
    """

    def __init__(self, config: ModelConfig, seed: int) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self._initialise(seed)
        if config.tied:
            self.head.weight = self.embed.weight

    def _initialise(self, seed: int) -> None:
        """From a generator of its own, so the weights depend on the seed alone, not on the world.

        Normal with deviation 0.02; projections into the residual stream are scaled down by the
        square root of their number (GPT-2).
        """
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / (2 * self.config.layers) ** 0.5 if into_residual else 0.02
                nn.init.normal_(weight, std=std, generator=generator)

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        phases = rotation(positions, self.config.head_dim, self.config.rope_theta)
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, phases, attend)
        return self.head(self.norm(x))
