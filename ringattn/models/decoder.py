"""A decoder as in Llama, Mistral and Qwen 2 and 3: RMSNorm, RoPE, grouped K/V heads, SwiGLU, tied
or untied head. Modules and weights have the names of their Hugging Face checkpoints.

It knows nothing of ranks: it sees local tokens, their positions, and a function ``attend``.
"""

from __future__ import annotations

import hashlib
from functools import partial

import torch
from einops import rearrange
from torch import nn

from ringattn.context import Attend
from ringattn.models import recompute
from ringattn.models.loss import chunked_cross_entropy, liger_cross_entropy
from ringattn.models.memory import Memory
from ringattn.models.rope import rotate, rotation
from ringattn.models.sizes import ModelConfig

# The sum over supervised local tokens, that of each token, and whether its label is the likeliest.
Loss = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, q, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.dim, kv, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.dim, kv, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q, config.dim, bias=False)
        norm = nn.RMSNorm if config.qk_norm else nn.Identity
        self.q_norm = norm(config.head_dim, config.norm_eps)
        self.k_norm = norm(config.head_dim, config.norm_eps)

    def forward(self, x: torch.Tensor, phases: torch.Tensor, attend: Attend) -> torch.Tensor:
        q, k, v = (
            rearrange(proj(x), "b t (h d) -> b t h d", d=self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = attend(rotate(self.q_norm(q), phases), rotate(self.k_norm(k), phases), v)
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
    def __init__(self, config: ModelConfig, memory: Memory) -> None:
        super().__init__()
        self.memory = memory
        self.input_layernorm = nn.RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: torch.Tensor, phases: torch.Tensor, attend: Attend) -> torch.Tensor:
        return recompute.block(self.memory, partial(self._compute, phases=phases, attend=attend), x)

    def _compute(self, x: torch.Tensor, phases: torch.Tensor, attend: Attend) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), phases, attend)
        return recompute.tiles(
            self.memory, lambda t: t + self.mlp(self.post_attention_layernorm(t)), x
        )


class Head(nn.Linear):
    """Logits, or with labels the loss; a module, so that engines gather its weight for both."""

    def forward(
        self, x: torch.Tensor, labels: torch.Tensor | None, memory: Memory
    ) -> torch.Tensor | Loss:
        if labels is None:
            return super().forward(x)
        if memory.loss == "liger" and torch.is_grad_enabled():
            return liger_cross_entropy(x, self.weight, labels), None, None
        return chunked_cross_entropy(x, self.weight, labels, memory.loss_chunk)


class Decoder(nn.Module):
    """``forward(tokens, positions, attend)`` gives logits ``[batch, tokens, vocab]``; with
    ``labels`` (shifted before the split) the loss: its sum over the supervised local tokens and
    that of each token, ``[batch, tokens]``, float32, and under no_grad whether each label is the
    likeliest token (else None). Logits of all tokens then never exist. (Liger's kernels give the
    sum alone.)

    tokens ``[batch, tokens]`` and positions ``[tokens]`` are this rank's own; ``attend`` is
    attention over the whole sequence (see :meth:`ringattn.context.Context.attend`).

    ``seed`` None leaves the weights as torch makes them: an engine fills in each rank's own.
    """

    def __init__(self, config: ModelConfig, seed: int | None, memory: Memory | None = None) -> None:
        super().__init__()
        self.config, self.memory = config, memory or Memory()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, self.memory) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.lm_head = Head(config.dim, config.vocab_size, bias=False)
        self.tie()
        if seed is not None:
            with torch.no_grad():
                for name, weight in self.named_parameters():
                    weight.copy_(initial_weight(config, seed, name, weight.shape))

    def tie(self) -> None:
        """Makes the head's weight the embedding's, if the model is so configured."""
        if self.config.tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attend: Attend,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor | Loss:
        phases = rotation(positions, self.config.head_dim, self.config.rope)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, phases, attend)
        return self.lm_head(self.norm(x), labels, self.memory)


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's name and shape; nothing is allocated."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Decoder(config, None).named_parameters()}


def initial_weight(config: ModelConfig, seed: int, name: str, shape: torch.Size) -> torch.Tensor:
    """The first value of a parameter, float32 on the host: a function of seed and name alone, so
    that any rank can make any parameter without making the others.

    Normal with deviation 0.02; projections into the residual stream are scaled down by the square
    root of their number (GPT-2). Norms are 1, biases 0.
    """
    if len(shape) < 2:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    number = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "little")
    generator = torch.Generator().manual_seed(number)
    into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    std = 0.02 / (2 * config.layers) ** 0.5 if into_residual else 0.02
    return torch.empty(shape, device="cpu").normal_(std=std, generator=generator)
