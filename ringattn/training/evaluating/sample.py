"""Text from the trained weights, through the same engine, plan and groups as training."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ringattn.context import Context, Strategy
from ringattn.data.tokenizer import Tokenizer
from ringattn.training.attention import Attention
from ringattn.training.engines import Engine


def generate(
    engine: Engine,
    context: Context,
    tokenizer: Tokenizer,
    prompt: str,
    count: int,
    seed: int,
    split: Strategy,
    attention: Attention,
    layers: int,
    temperature: float = 0.7,
) -> str:
    """``prompt`` continued by up to ``count`` tokens, or to the end of the document. Collective.

    Every token is one forward over the text so far, which stays right at any ZeRO stage and
    split whose layout is contiguous; the rank that owns the last position draws, and tells the
    others.
    """
    begin = tokenizer.before or [tokenizer.end]  # of another document, before this one
    tokens = [*begin, *tokenizer.encode(prompt).tolist()]
    generator = torch.Generator().manual_seed(seed)
    engine.train(False)
    for _ in range(count):
        n = len(tokens)
        # Of a text of few tokens some ranks would have none, which not every model bears: what is
        # put behind it does not change it.
        padded = tokens + [tokenizer.end] * (context.cp - n)
        length = len(padded)
        texts = [length], length
        kinds = attention.layers(layers)
        plans = split.plans(attention.masks(*texts), kinds, attention.states(*texts))
        own = torch.from_numpy(plans.layout.positions(context.cp_rank)).to(context.device)
        text = torch.tensor(padded, device=context.device)
        with torch.no_grad():
            logits = engine.forward(text[own][None], own, context.attend(plans))
        # Drawn from the same numbers on every rank; only the owner's draw means anything.
        noise = torch.rand(1, generator=generator, dtype=torch.float64)
        token = torch.zeros(1, dtype=torch.int64, device=context.device)
        last = (own == n - 1).nonzero()
        if len(last):
            usable = logits[0, int(last), : tokenizer.vocab_size].double().cpu()
            weights = torch.softmax(usable / temperature, -1)
            drawn = torch.searchsorted(weights.cumsum(0), noise).clamp(max=len(usable) - 1)
            token.copy_(drawn)
        # The last position is owned by one rank of each sequence group; others hold 0.
        dist.all_reduce(token, group=context.cp_group)
        tokens.append(int(token))
        if tokens[-1] == tokenizer.end:
            break
    engine.train(True)
    return tokenizer.decode([token for token in tokens if token != tokenizer.end])
