"""Recall by a recurrent model and by a 3 : 1 hybrid of it with attention; draws docs/recall.png.

    python benchmarks/recall.py [--steps 2400] [--out docs/recall.png] [KEY=VALUE ...]

Eight pairs of tokens are shown somewhere in a text, and every key is asked for at its end
(multi-query associative recall, Arora et al. 2023, arXiv:2312.04927). Both models have four layers
and are trained alike, side by side with one thread each; their states are small (one of 4 x 64), so
that what has to be remembered does not fit in. Prints the share of values recalled, the mean over
depths, by step.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from matplotlib.figure import Figure
from passkey import finish, start

ROOT = Path(__file__).resolve().parent.parent
MEMORY = "memory:{mixer:gated_delta,heads:1,key_dim:4,value_dim:64}"
RUNS = {
    "recurrent: 4 x gated delta": [f"attention.kinds={{{MEMORY}}}", "attention.pattern=[memory]"],
    "hybrid: 3 x gated delta, 1 x attention": [
        f"attention.kinds={{{MEMORY},global:causal}}",
        "attention.pattern=[memory,memory,memory,global]",
    ],
}
KEYS = [
    "experiment=passkey", "model=hybrid-tiny", "data=recall", "engine=fsdp",
    "model.layers=4", "model.kv_heads=4", "seq_len=128", "batch_size=16", "eval.probes=[recall]",
    "eval.lengths=[128]", "optim.lr=1e-3",
]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/recall.png")
    parser.add_argument("keys", nargs="*")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        often = [f"train.steps={options.steps}", f"eval.every={options.steps // 12}"]
        jobs = {
            name: start(f"{folder}/{number}", 1, *KEYS, *often, *own, *options.keys)
            for number, (name, own) in enumerate(RUNS.items())
        }
        figure = Figure(figsize=(6.5, 3.6), layout="constrained")
        axis = figure.subplots()
        for number, (name, job) in enumerate(jobs.items()):
            finish(job)
            lines = Path(folder, str(number), "eval.jsonl").read_text().splitlines()
            curve = {
                values["step"]: sum(cell["accuracy"] for cell in values["probes"])
                / len(values["probes"])
                for values in map(json.loads, lines)
            }
            axis.plot(list(curve), list(curve.values()), marker="o", label=name)
            last = max(curve)
            print(f"{name}: {100 * curve[last]:.0f} % of the values recalled after {last:,} steps",
                  flush=True)  # fmt: skip
        print(f"both side by side: {time.monotonic() - begin:,.0f} s")
    axis.set_xlabel("optimizer steps")
    axis.set_ylabel("values recalled, of 8 pairs")
    axis.set_ylim(-0.03, 1.03)
    axis.grid(alpha=0.3)
    axis.legend(loc="center left")
    figure.savefig(options.out, dpi=120)


if __name__ == "__main__":
    main()
