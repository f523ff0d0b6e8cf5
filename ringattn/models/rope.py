"""Rotary position embedding (Su et al. 2021), halves rotated as in Llama's Hugging Face weights."""

import torch


def rotation(positions: torch.Tensor, head_dim: int, theta: float) -> torch.Tensor:
    """cos and sin of every phase: float32 ``[2, tokens, 1, head_dim / 2]``.

    positions: int64 ``[tokens]``, global or per document. The product of position and frequency
    is taken in float64, since float32 is off by 0.06 rad at position 1,000,000.
    """
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64) / head_dim
    phases = positions.double()[:, None] * theta**-exponent
    return torch.stack([phases.cos(), phases.sin()])[:, :, None].float()


def rotate(x: torch.Tensor, phases: torch.Tensor) -> torch.Tensor:
    """x ``[batch, tokens, heads, head_dim]`` rotated in float32, returned in its own dtype."""
    cos, sin = phases
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
