"""The example of docs/million_tokens.md: the forecast of the large run, and the small one, run.

    python benchmarks/million_tokens.py [--run FOLDER] [--out docs/million_tokens.png]

The forecast is `ringattn estimate experiment=continue_llama` of a model with the sizes of Llama 3.1
8B on 8 GPUs: nothing is measured. The small run is examples/million_tokens/small.sh: base/, a model
of 1,024 tokens, goes on at 16,384 on two ranks of one thread each; held-out loss by position and
needles are evaluated of the base, with its own RoPE and with a stretched one, and after the last
step. --run: a finished run directory, with FOLDER-before beside it, to draw again.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from matplotlib.figure import Figure

from ringattn.training.observing.pictures import heat_map

ROOT = Path(__file__).resolve().parent.parent
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 14336, "vocab_size": 128256, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": False, "max_position_embeddings": 131072, "rope_theta": 5e5,
}  # fmt: skip


def forecast() -> None:
    """What the large run would take on 8 GPUs of each kind, as a table."""
    print("| 8 GPUs | GiB of each | GiB of host memory, each rank | s a sequence | whole run |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(LLAMA))
        for hardware in ("h100", "h200", "b200"):
            keys = ["experiment=continue_llama", f"model.path={folder}", f"hardware={hardware}"]
            done = subprocess.run(
                [sys.executable, "-m", "ringattn", "estimate", *keys, "ranks=8", "--json"],
                stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            (one,) = json.loads(done.stdout)["ranked"]
            memory = one["memory"]
            device = sum(memory[part] for part in ("states", "kept", "working"))
            accum, steps = recipe("grad_accum"), recipe("steps")
            hours = one["seconds"] * steps / 3600
            each = one["seconds"] / accum
            whole = f"{hours:,.0f} h for {steps} steps of {accum} sequences"
            gib = f"{device / 2**30:.1f} | {memory['host'] / 2**30:.1f}"
            print(f"| {hardware.upper()} | {gib} | {each:,.0f} | {whole} |")


def recipe(key: str) -> int:
    """A number of continue_llama.yaml."""
    text = (ROOT / "configs/experiment/continue_llama.yaml").read_text()
    return int(re.search(rf"^  {key}: (\d+)", text, re.MULTILINE)[1])


def small(folder: Path) -> float:
    """Runs the example; seconds."""
    begin = time.monotonic()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(
        ["bash", ROOT / "examples/million_tokens/small.sh", "logger=none"], check=True,
        env=os.environ | {"OUT": str(folder), "PATH": path}, stdout=sys.stderr,
    )  # fmt: skip
    return time.monotonic() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/million_tokens.png")
    options = parser.parse_args()
    forecast()
    with tempfile.TemporaryDirectory() as name:
        folder = options.run or Path(name, "run")
        seconds = None if options.run else small(folder)
        before, stretched, after = (
            json.loads(Path(f"{folder}{end}", "eval.jsonl").read_text().splitlines()[at])
            for end, at in (("-before", -1), ("", 0), ("", -1))
        )
    lines = {"before": before, "RoPE stretched, no step": stretched}
    lines[f"after {after['step']} steps"] = after
    lengths = sorted({cell["length"] for cell in before["probes"]})
    print("\n| | " + " | ".join(f"needles, {n:,} tokens" for n in lengths) + " | held-out loss |")
    print("|---" * (len(lengths) + 2) + "|")
    for title, line in lines.items():
        found = [[c["accuracy"] for c in line["probes"] if c["length"] == n] for n in lengths]
        cells = " | ".join(f"{100 * sum(x) / len(x):.0f} %" for x in found)
        print(f"| {title} | {cells} | {line['loss']:.2f} |")
    if seconds is not None:
        print(f"\nAll of small.sh took {seconds / 60:.1f} minutes.")
    figure = Figure(figsize=(17, 3.6), layout="constrained")
    left, *maps = figure.subplots(1, 4, width_ratios=(4, 5, 5, 5))
    for title, line in lines.items():
        places = line["loss_by_position"]
        left.plot([x["below"] for x in places], [x["loss"] for x in places], "o-", label=title)
    left.axvline(1024, color="grey", linestyle="--", linewidth=0.8)
    left.set_xscale("log", base=2)
    left.set(xlabel="position below (dashed: trained length of the base)", ylabel="loss (nats)",
             title="held-out source code")  # fmt: skip
    left.legend()
    for axes, (title, line) in zip(maps, lines.items(), strict=True):
        heat_map(line["probes"], f"needles found, {title}", axes)
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
