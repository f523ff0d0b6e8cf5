"""How long a user waits for Python: imports and commands of the installed package.

    python benchmarks/start.py [--rounds 9]

Each a process of its own, in turns; medians (smallest-largest) of the whole process, start of
Python included, whose own share is the first row. "torch" says whether the process has loaded it.
"""

import argparse
import statistics
import subprocess
import sys
import time

WHAT = {
    "Python alone": ["-c", "pass"],
    "import ringattn": ["-c", "import ringattn"],
    "ringattn plan, 1M tokens on 64 ranks": [
        "-m", "ringattn", "plan", "mask=sliding_window(4096) | sinks(4)", "n=1M", "world=64",
        "layout=balanced", "schedule=direct",
    ],
    "import torch": ["-c", "import torch"],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    seconds = {name: [] for name in WHAT}
    for number in range(rounds + 1):
        for name, words in WHAT.items():
            begin = time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
            if number:  # the first fills the page cache
                seconds[name].append(time.perf_counter() - begin)
    print("| what | s | torch |\n|---|---|---|")
    for name, words in WHAT.items():
        traced = subprocess.run(
            [sys.executable, "-X", "importtime", *words], capture_output=True, text=True, check=True
        )
        loaded = any(line.split("|")[-1].strip() == "torch" for line in traced.stderr.splitlines())
        each = seconds[name]
        print(f"| {name} | {statistics.median(each):.2f} ({min(each):.2f}-{max(each):.2f}) | "
              f"{'yes' if loaded else 'no'} |")  # fmt: skip


if __name__ == "__main__":
    main()
