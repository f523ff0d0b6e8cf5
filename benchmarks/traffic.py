"""Bytes that really move, beside the plan's count and the lower bound, and the balance of work.

    python benchmarks/traffic.py [--worlds 4 8] [--tokens 2048] [--balance-tokens 1048576]

First table: forward + backward on virtual ranks with a counting carrier; fp32, 4 heads, 2 K/V heads
of 8, per rank (mean). "rows" are K/V rows received in the forward; the bound is rows attended and
not owned, each once. "exact": counted bytes equal the plan's on every rank. Second table: largest
work over the mean for causal and for packed documents (log-normal, median 600, up to 128k tokens).
"""

import argparse

import numpy as np
import torch

import ringattn as ra
from ringattn import cost
from ringattn.execution.carriers import Counted, VirtualWorld
from ringattn.planning import schedules

HEADS, KV_HEADS, DIM = 4, 2, 8


def masks(n):
    return {
        "causal": ra.masks.causal(n),
        "full": ra.masks.full(n),
        "window 1/16 + sinks": ra.masks.sliding_window(n, n // 16) | ra.masks.sinks(n, 4),
        "documents": ra.masks.documents(heavy_tailed(n, 60, n // 8)),
        "prefix 1/4": ra.masks.prefix_lm(n, n // 4),
        "dilated": ra.masks.dilated(n, 32, 4),
        "strided": ra.masks.strided(n, 8),
        "big bird": ra.masks.big_bird(n, n // 64),
        "block causal": ra.masks.block_causal(n, n // 16),
    }


def heavy_tailed(n, median, most, seed=0):
    draw = np.random.default_rng(seed)
    lengths = []
    while (left := n - sum(lengths)) > 0:
        lengths.append(min(left, most, max(1, int(draw.lognormal(np.log(median), 1.6)))))
    return lengths


def counted(plan):
    """Bytes received by every rank in one forward and backward."""
    n = plan.mask.n_q
    counters = {}

    def work(rank):
        counters[rank.rank] = Counted(rank)
        tokens = plan.layout.count(rank.rank)
        q, k, v = (
            torch.randn(1, tokens, heads, DIM, requires_grad=True)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        ra.ring_attention(q, k, v, plan, group=counters[rank.rank]).sum().backward()

    VirtualWorld(plan.world).run(work)
    assert n == plan.layout.n
    return [counters[rank].received for rank in range(plan.world)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--balance-tokens", type=int, default=2**20)
    arguments = parser.parse_args()
    n, shape = arguments.tokens, cost.AttentionShape(HEADS, KV_HEADS, DIM, itemsize=4)
    print(f"L = {n}, layout balanced\n")
    print("| mask | ranks | schedule | rows | bound | rows / bound | KiB fwd + bwd | exact |")
    print("|---|---|---|---|---|---|---|---|")
    for world in arguments.worlds:
        for name, mask in masks(n).items():
            layout = ra.layouts.balanced(mask, world)
            variants = [(schedule, 1) for schedule in schedules.BUILDERS]
            for schedule, ulysses in [*variants, ("direct", 2)]:
                plan = ra.make_plan(mask, layout, schedule, ulysses, node_size=2)
                wanted = [cost.received(plan, rank, shape) for rank in range(world)]
                wanted = [bytes_.forward + bytes_.backward for bytes_ in wanted]
                got = counted(plan)
                rows = sum(m.tokens for r in range(world) for s in plan.steps(r) for m in s.recvs)
                bound = sum(cost.lower_bound(plan, rank) for rank in range(world))
                label = schedule if ulysses == 1 else f"{schedule}, ulysses {ulysses}"
                print(
                    f"| {name} | {world} | {label} | {rows / world:.0f} | {bound / world:.0f} | "
                    f"{rows / max(bound, 1):.2f} | {sum(got) / world / 1024:.0f} | "
                    f"{'yes' if got == wanted else 'NO'} |",
                    flush=True,
                )
    n = arguments.balance_tokens
    lengths = heavy_tailed(n, 600, 2**17)
    print(f"\nL = {n}; {len(lengths)} documents, the longest {max(lengths)}\n")
    print("| mask | ranks | contiguous | zigzag | striped | balanced |")
    print("|---|---|---|---|---|---|")
    for name, mask in (("causal", ra.masks.causal(n)), ("documents", ra.masks.documents(lengths))):
        for world in (8, 16, 32, 64):
            values = (
                ra.make_plan(mask, ra.layouts.build(layout, mask, world)).imbalance
                for layout in ("contiguous", "zigzag", "striped", "balanced")
            )
            print(f"| {name} | {world} | " + " | ".join(f"{value:.3f}" for value in values) + " |")


if __name__ == "__main__":
    main()
