"""How unequal the work of data ranks is, with packed documents of log-normal lengths, and what
dealing rows by their work does about it: simulated at 64 x 8 ranks, and measured on processes.

    python benchmarks/balance.py                  # both
    python benchmarks/balance.py --simulate       # seconds, no process

Simulated: an 8B model (32 layers, 4,096 wide, 32 heads of 128) trains on rows of 131,072 tokens, 64
data ranks of 8 ranks that share a row each, 4 micro-steps. Document lengths are exp(N(8.2, 1.5)):
a median of 3,641 tokens, cut at a row. FLOPs are those of a training step; imbalance is the largest
work of a data rank over the mean, both summed over micro-steps, 1 being perfect: what ranks wait.

Measured: how long forward and backward of rows take, one after the other on one thread; what ranks
would wait for each other is then counted with these seconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ringattn import make_plan
from ringattn.batches import position_ids
from ringattn.cost.model import step_flops
from ringattn.data.packing import Rows, balanced, best_fit
from ringattn.execution.attention import ring_attention
from ringattn.models.decoder import Decoder
from ringattn.models.sizes import ModelConfig
from ringattn.planning import layouts, masks
from ringattn.planning.balancing import deal, imbalance

ROOT = Path(__file__).resolve().parent.parent
ROW, DATA, MICRO, STEPS = 131_072, 64, 4, 15
MODEL = ModelConfig(
    dim=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn_dim=14336, vocab_size=128256
)


def cut(lengths: np.ndarray, row: int, order: np.ndarray) -> Rows:
    """Documents joined and cut."""
    ends = np.cumsum(lengths[order])
    edges = np.union1d(np.concatenate([[0], ends]), np.arange(0, ends[-1] + 1, row))
    edges = edges[edges <= ends[-1] // row * row]
    first = np.searchsorted(edges, np.arange(0, edges[-1] + 1, row))
    length = np.diff(edges)
    return Rows(first, np.zeros_like(length), np.zeros_like(length), length)


def work(rows: Rows) -> np.ndarray:
    """FLOPs of every row; attention is causal inside of documents."""
    pairs = rows.length.astype(np.float64) * (rows.length + 1) / 2
    areas = np.add.reduceat(pairs, rows.first[:-1])
    return np.array([step_flops(MODEL, ROW, area) for area in areas])


def simulated() -> list[str]:
    draw = np.random.default_rng(0)
    lengths = np.clip(np.exp(draw.normal(8.2, 1.5, 60_000)).astype(np.int64), 32, ROW)
    table = ["| packing | rows | empty | in their order (range) | dealt (range) |",
             "|---|---|---|---|---|"]  # fmt: skip
    for name, pack in (("cut", cut), ("best_fit", best_fit), ("balanced", balanced)):
        rows = pack(lengths, ROW, draw.permutation(len(lengths)))
        count = len(rows.first) - 1
        flops = work(rows)[draw.permutation(count)]
        before, after = [], []
        for at in range(0, min(STEPS, count // (DATA * MICRO)) * DATA * MICRO, DATA * MICRO):
            step = flops[at : at + DATA * MICRO]
            before.append(imbalance(step.reshape(MICRO, DATA)))
            dealt = deal(step, DATA, MICRO)
            after.append(imbalance([[step[own].sum() for own in ranks] for ranks in dealt]))
        empty = 1 - rows.tokens / (count * ROW)
        shown = (f"{statistics.median(x):.2f} ({min(x):.2f}-{max(x):.2f})" for x in (before, after))
        table.append(f"| {name} | {count:,} | {empty:.2%} | {' | '.join(shown)} |")
    return table


def measured(repeats: int) -> list[str]:
    """Seconds of forward and backward of 64 rows of 4,096 tokens, one thread, the median of some
    runs of each; then 4 steps of 4 data ranks and 4 micro-steps are made of them."""
    torch.set_num_threads(1)
    draw = np.random.default_rng(1)
    row, ranks, micro, steps = 4096, 4, 4, 4
    lengths = np.clip(np.exp(draw.normal(6.5, 1.5, 400)).astype(np.int64), 64, row)
    rows = best_fit(lengths, row, draw.permutation(len(lengths)))
    chosen = draw.permutation(len(rows.first) - 1)[: ranks * micro * steps]
    model = ModelConfig(
        dim=64, layers=2, heads=4, kv_heads=4, head_dim=64, ffn_dim=128, vocab_size=256
    )
    decoder = Decoder(model, 0)
    seconds: list[list[float]] = [[] for _ in chosen]
    flops = []
    for turn in range(repeats + 1):  # the first one starts things up
        for number, which in enumerate(chosen):
            part = slice(rows.first[which], rows.first[which + 1])
            own = rows.length[part].tolist()
            own += [row - sum(own)] * (sum(own) < row)
            layout = layouts.contiguous(row, 1)
            plan = make_plan(masks.documents(own), layout)
            tokens = torch.randint(256, (1, row))
            positions = position_ids(layout, 0, own)
            begin = time.perf_counter()
            attend = partial(ring_attention, plan=plan)
            decoder(tokens, positions, attend, tokens)[0].backward()
            if turn:
                seconds[number].append(time.perf_counter() - begin)
            else:
                flops.append(step_flops(model, row, plan.mask.area))
    each = np.array([statistics.median(own) for own in seconds])
    table = ["| rows | imbalance of FLOPs (range) | imbalance of measured seconds (range) |",
             "|---|---|---|"]  # fmt: skip
    for name in ("in their order", "dealt by FLOPs"):
        found: list[list[float]] = [[], []]
        for at in range(0, len(each), ranks * micro):
            part = slice(at, at + ranks * micro)
            order = np.arange(ranks * micro).reshape(micro, ranks, 1).tolist()
            dealt = order if name == "in their order" else deal(flops[part], ranks, micro)
            for kind, values in zip(found, (np.array(flops[part]), each[part]), strict=True):
                kind.append(imbalance([[values[own].sum() for own in own_] for own_ in dealt]))
        shown = (f"{statistics.median(x):.2f} ({min(x):.2f}-{max(x):.2f})" for x in found)
        table.append(f"| {name} | {' | '.join(shown)} |")
    return table


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    lines = ["Simulated, 64 x 8 ranks, imbalance of a step:", "", *simulated()]
    if not options.simulate:
        lines += ["", f"Measured, medians of {options.repeats} runs of each row:", ""]
        lines += measured(options.repeats)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
