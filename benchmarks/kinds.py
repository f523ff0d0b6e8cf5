"""The forecast of a pattern of kinds against the step that is measured, on this machine.

    python benchmarks/kinds.py DESCRIPTION [ranks, default 2] [tokens, default 4096]

DESCRIPTION: of `ringattn calibrate out=DESCRIPTION`. Trains a small decoder with a window in all
layers, in three of four, and in none, with the schedule "direct" and the balanced layout. Printed:
the median of the measured steps (the first two are left out), what was predicted, and the error;
peak memory too.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KINDS = 'attention.kinds={local:"sliding_window(512)",global:causal}'
CASES = {
    "window in all layers": ["attention.window=512"],
    "3 local : 1 global": [KINDS, "attention.pattern=[local,local,local,global]"],
    "1 local : 1 global": [KINDS, "attention.pattern=[local,global]"],
    "no window": [],
}


def main(description: str, ranks: int, tokens: int) -> None:
    print("| layers | predicted s | measured s | spread | error | memory error |")
    print("|---|---|---|---|---|---|")
    for name, keys in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                str(ranks), str(ROOT / "train.py"), f"hardware={description}", f"seq_len={tokens}",
                "attention=causal", "model=tiny", "model.layers=8", "train.steps=8", "logger=none",
                "train.sample_tokens=0", "checkpoint.every=null", f"run_dir={folder}",
                "parallel.schedule=direct", "parallel.layout=balanced", "engine=fsdp", *keys,
            ]  # fmt: skip
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, capture_output=True, env=environment)
            facts = json.loads((Path(folder) / "facts.json").read_text())["predicted"]
            lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines][2:]
        took = sorted(step["step_s"] for step in steps)
        median = statistics.median(took)
        memory = max(step["peak_memory_bytes"] for step in steps)
        spread, error = (took[-1] - took[0]) / median, facts["seconds"] / median - 1
        of_memory = facts["peak_memory_bytes"] / memory - 1
        row = f"| {name} | {facts['seconds']:.2f} | {median:.2f} | {spread:.0%} | {error:+.0%} |"
        print(f"{row} {of_memory:+.0%} |", flush=True)


if __name__ == "__main__":
    numbers = [int(x) for x in sys.argv[2:]]
    main(sys.argv[1], *(numbers + [2, 4096][len(numbers) :]))
