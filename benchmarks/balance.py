"""How unequal the work of data ranks is, with packed documents of log-normal lengths, and what
dealing rows by their work does about it: simulated at 64 x 8 ranks, and measured on processes.

    python benchmarks/balance.py                  # both; writes benchmarks/results/balance.md
    python benchmarks/balance.py --simulate       # seconds, no process

Simulated: an 8B model (32 layers, 4,096 wide, 32 heads of 128) trains on rows of 131,072 tokens, 64
data ranks of 8 ranks that share a row each, 4 micro-steps. Document lengths are exp(N(8.2, 1.5)):
a median of 3,641 tokens, cut at a row. FLOPs are those of a training step; imbalance is the largest
work of a data rank over the mean, both summed over micro-steps, 1 being perfect: what ranks wait.

Measured: train.py on 2 data ranks, runs with and without dealing in turns; medians of their steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from ringattn.cost.model import step_flops
from ringattn.data.packing import Rows, balanced, best_fit
from ringattn.models.sizes import ModelConfig
from ringattn.planning.balancing import deal, imbalance

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks/results/balance.md"
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


def measured(rounds: int) -> list[str]:
    """train.py on 2 data ranks of one thread, rows of 2,048 tokens, 4 micro-steps."""
    draw = np.random.default_rng(1)
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(400):
            size = int(np.clip(np.exp(draw.normal(5.2, 1.5)), 8, 2048))
            path = Path(folder, "text", f"{number}.txt")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(draw.integers(97, 123, size, dtype=np.uint8).tobytes())
        for turn in range(rounds):
            for balance in ("false", "true"):
                run = Path(folder, f"{balance}-{turn}")
                keys = [
                    "model.dim=64", "model.layers=4", "model.heads=4", "model.kv_heads=4",
                    "model.head_dim=64", "model.ffn_dim=64", "seq_len=2048", "data=files",
                    f"data.root={folder}/text", f"data.cache={folder}/cache",
                    "data.packing=best_fit", f"data.balance={balance}", "parallel.cp=1",
                    "train.grad_accum=4", "train.steps=6", "checkpoint.every=0", "logger=none",
                    "train.sample_tokens=0", "peak_flops=1e9", f"run_dir={run}",
                ]  # fmt: skip
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc-per-node", "2", str(ROOT / "train.py"), *keys]  # fmt: skip
                subprocess.run(
                    command, check=True, capture_output=True, timeout=900,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                )  # fmt: skip
                lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
                own = found.setdefault(balance, {"step_s": [], "imbalance": []})
                for line in list(lines)[1:]:  # the first one starts things up
                    for name in own:
                        own[name].append(line[name])
    table = ["| rows | imbalance | seconds a step (quartiles) |", "|---|---|---|"]
    for balance, name in (("false", "in their order"), ("true", "dealt")):
        seconds = found[balance]["step_s"]
        low, middle, high = statistics.quantiles(seconds, n=4)
        unequal = statistics.median(found[balance]["imbalance"])
        table.append(f"| {name} | {unequal:.2f} | {middle:.2f} ({low:.2f}-{high:.2f}) |")
    return table


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    lines = ["# Work of data ranks", "", "By benchmarks/balance.py, which says the conventions.",
             "", "Simulated, 64 x 8 ranks, imbalance of a step:", "", *simulated()]  # fmt: skip
    if not options.simulate:
        lines += ["", f"Measured, 2 data ranks, {options.rounds} runs each in turns:", ""]
        lines += measured(options.rounds)
        RESULT.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
