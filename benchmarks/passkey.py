"""experiment=passkey with the whole context and with a window only; draws docs/passkey.png.

    python benchmarks/passkey.py [--world 2] [--out docs/passkey.png] [KEY=VALUE ...]

Prints, for each, the seconds that training took and the share of keys retrieved at every length
(the mean over depths) after the last step. A window of w tokens in l layers reaches l (w - 1)
tokens back; a key that is further away can only be guessed: 1e-5 for five digits.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from matplotlib.figure import Figure

from ringattn.training.observing.pictures import heat_map

ROOT = Path(__file__).resolve().parent.parent
RUNS = {"whole context": [], "window of 32": ["attention.window=32"]}


def start(run_dir, world, *keys):
    """train.py on so many ranks of one thread each, without a logger."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         f"--nproc-per-node={world}", str(ROOT / "train.py"), "logger=none",
         f"run_dir={run_dir}", *keys],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
    )  # fmt: skip


def finish(job):
    if job.wait():
        raise SystemExit(f"exit status {job.returncode}: {' '.join(job.args)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/passkey.png")
    parser.add_argument("keys", nargs="*")
    options = parser.parse_args()
    figure = Figure(figsize=(8.5, 3.4), layout="constrained")
    axes = figure.subplots(1, len(RUNS))
    for (name, more), place in zip(RUNS.items(), axes, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            begin = time.monotonic()
            finish(
                start(f"{folder}/run", options.world, "experiment=passkey", *options.keys, *more)
            )
            seconds = time.monotonic() - begin
            last = json.loads(Path(folder, "run/eval.jsonl").read_text().splitlines()[-1])
        cells = last["probes"]
        heat_map(cells, f"{name}, {last['step']} steps", place)
        lengths = sorted({cell["length"] for cell in cells})
        means = {
            n: sum(c["accuracy"] for c in cells if c["length"] == n)
            / sum(c["length"] == n for c in cells)
            for n in lengths
        }
        shown = ", ".join(f"{100 * x:.1f} % at {n}" for n, x in means.items())
        print(f"{name}: {seconds:.0f} s; keys found: {shown}", flush=True)
    figure.savefig(options.out, dpi=120)


if __name__ == "__main__":
    main()
