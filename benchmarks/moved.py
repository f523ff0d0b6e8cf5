"""What layers with a state move, by the way that summaries are exchanged: read off plans.

    python benchmarks/moved.py

A gated delta rule of 16 heads of 128 in bf16, zigzag, one document; the busiest rank, forward and
backward, MB. Nothing is measured: `ringattn plan "kinds=memory: gated_delta" n=... world=...
heads=16 head_dim=128` says the same.
"""

import json
import subprocess
import sys

CASES = ((65536, 2), (65536, 8), (2**20, 64), (2**20, 1024))


def ways(n: int, world: int) -> dict[str, float]:
    """By way, MB that the busiest rank receives."""
    command = ["plan", "kinds=memory: gated_delta", f"n={n}", f"world={world}", "heads=16"]
    done = subprocess.run(
        [sys.executable, "-m", "ringattn", *command, "head_dim=128", "--json"],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)["kinds"]["memory"]["ways"]
    return {name: way["bytes"] / 1e6 for name, way in found.items()}


def main() -> None:
    print("| tokens | ranks | direct | doubling | contiguous, the better |\n|---|---|---|---|---|")
    for n, world in CASES:
        all_ways = ways(n, world)
        moved = min(x for name, x in all_ways.items() if name.startswith("contiguous"))
        cells = [all_ways["direct"], all_ways["doubling"], moved]
        shown = [f"{x:,.1f} MB" if x < 100 else f"{x:,.0f} MB" for x in cells]
        shown = [
            f"**{text}**" if x == min(cells) else text for x, text in zip(cells, shown, strict=True)
        ]
        print(f"| {n:,} | {world:,} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
