"""Text from the trained weights, through the same engine, plan and groups as training."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ringattn import masks
from ringattn.context import Context, Strategy
from ringattn.data.corpus import END
from ringattn.training.engine import Engine


def generate(
    engine: Engine,
    context: Context,
    prompt: str,
    count: int,
    seed: int,
    split: Strategy,
    temperature: float = 0.7,
) -> str:
    """``prompt`` continued by up to ``count`` bytes, or to the end of the document. Collective.

    Every token is one forward over the text so far, which stays right at any ZeRO stage and
    split whose layout is contiguous; the rank that owns the last position draws, and tells the
    others.
    """
    tokens = [END, *prompt.encode()]
    generator = torch.Generator().manual_seed(seed)
    engine.train(False)
    for _ in range(count):
        n = len(tokens)
        plan = split.plan(masks.causal(n))
        own = torch.from_numpy(plan.layout.positions(context.cp_rank)).to(context.device)
        text = torch.tensor(tokens, device=context.device)
        with torch.no_grad():
            logits = engine.forward(text[own][None], own, context.attend(plan))
        # Drawn from the same numbers on every rank; only the owner's draw means anything.
        noise = torch.rand(1, generator=generator, dtype=torch.float64)
        token = torch.zeros(1, dtype=torch.int64, device=context.device)
        if len(own) and own[-1] == n - 1:
            weights = torch.softmax(logits[0, -1, : END + 1].double() / temperature, -1).cpu()
            drawn = torch.searchsorted(weights.cumsum(0), noise).clamp(max=END)
            token.copy_(drawn)
        # The last position is owned by one rank of each sequence group; others hold 0.
        dist.all_reduce(token, group=context.cp_group)
        tokens.append(int(token))
        if tokens[-1] == END:
            break
    engine.train(True)
    return bytes(t for t in tokens if t < END).decode(errors="replace")
