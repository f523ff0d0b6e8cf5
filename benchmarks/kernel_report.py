"""The tables of docs/kernels.md and of the README about compiled kernels: no GPU needed.

    python benchmarks/kernel_report.py

Runs `ringattn kernels` (some minutes on two cores, where nothing is compiled yet) and prints
Markdown: what every line in bf16 compiles to, added to a running sum; the instructions of a warp in
one turn of the loop over unmasked tiles, beside what the algorithm takes at least; and what that
lets a Hopper GPU expect, beside what one has shown.

The estimate counts cycles of a multiprocessor for one tile: products at 4,096 operations per cycle,
instructions of all warps at four per cycle, exponentials at 16 per cycle. If the warps computed in
step, the products would wait for the rest of it: the lower number. If all of it overlapped, the
slowest alone would count: the upper one. Both are in TFLOP/s at the rate of the matrix product that
was measured in the same run, with the conventions of gpu_suite.py.
"""

import json
import subprocess
import sys
from pathlib import Path

RESULT = Path(__file__).parent / "results/nvidia-h200_2026-11-27.json"
WHICH = ["bits=16", "pointers=no", "softcap=no", "head_dim=64,128,192/128,256"]
PASSES = {
    "forward": "forward",
    "backward": "backward",
    "backward_keys": "dk, dv",
    "backward_queries": "dq",
}
KINDS = ("matrix", "exp2", "float", "convert", "memory", "other")
# Products of a pass; the backward counts as five, whatever a kernel computes.
PRODUCTS = {"forward": 2, "backward": 5, "backward_keys": 4, "backward_queries": 3}
PER_CYCLE, SCHEDULERS, EXPONENTIALS = 4096, 4, 16
WARPS = 8  # that compute, in all kernels of sm_90


def table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def title(fact: dict) -> list[str]:
    d, dv = fact["head_dim"], fact["v_dim"]
    dims = f"{d}" if d == dv else f"{d}/{dv}"
    return [fact["arch"], fact["engine"], dims, PASSES[fact["name"]]]


def cycles(fact: dict) -> tuple[float, float, float]:
    """(products, instructions, exponentials) of one tile on one multiprocessor."""
    pairs = fact["m"] * fact["n"]
    products = 2 * pairs * fact["head_dim"] * PRODUCTS[fact["name"]] / PER_CYCLE
    issued = WARPS * sum(fact["mix"].values()) / SCHEDULERS
    return products, issued, pairs / EXPONENTIALS


def estimates(facts: list[dict], found: dict) -> list[list[str]]:
    rows = []
    peak = found["peak_tflops"]
    for dim in (64, 128):
        for engine in ("gluon", "triton"):
            for which in ("forward", "backward"):
                own = [
                    f
                    for f in facts
                    if (f["arch"], f["engine"], f["head_dim"], f["v_dim"], f["adds"])
                    == ("sm_90", engine, dim, dim, False)
                    and f["name"].startswith(which)
                ]
                parts = [cycles(f) for f in own]
                useful = 2 * own[0]["m"] * own[0]["n"] * dim * PRODUCTS[which] / PER_CYCLE
                in_step = sum(a + max(b, c) for a, b, c in parts)
                at_once = sum(max(part) for part in parts)
                (measured,) = (
                    row["tflops"][engine][0]
                    for row in found["speed"]
                    if (row["pass"], row["mask"], row["head_dim"]) == (which, "full", f"{dim}")
                )
                each = (" + ".join(f"{part[i]:.0f}" for part in parts) for i in range(3))
                low, high = (peak * useful / x for x in (in_step, at_once))
                rows.append(
                    [f"{dim}", which, engine, *each, f"{low:.0f}-{high:.0f}", f"{measured:.0f}"]
                )
    return rows


def main() -> None:
    command = [sys.executable, "-m", "ringattn", "kernels", *WHICH, "--json"]
    facts = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout)
    order, archs = list(PASSES), ["sm_80", "sm_90", "sm_100"]
    facts.sort(
        key=lambda f: (
            archs.index(f["arch"]),
            f["engine"],
            f["head_dim"],
            f["v_dim"],
            order.index(f["name"]),
        )
    )
    rows = []
    for fact in filter(lambda f: f["adds"], facts):
        products = ", ".join(f"{n} {kind}" for kind, n in fact["matrix"].items())
        shared = f"{fact['shared'] / 1024:.0f} of {fact['shared_limit'] / 1024:.0f}"
        numbers = [str(fact["registers"]), str(fact["spill"]), shared, products]
        tile = f"{fact['m']} \u00d7 {fact['n']}"
        rows.append([*title(fact), tile, *numbers, f"{fact['intensity']:.0f}"])
    columns = ["tile", "registers", "spill", "shared KiB", "products", "FLOP/B"]
    print(table(["", "kernel", "head_dim", "pass", *columns], rows), end="\n\n")
    rows = []
    for fact in facts:
        if fact["adds"] or fact["arch"] == "sm_80" or fact["head_dim"] > 128:
            continue
        mix, needed = fact["mix"], fact["needed"]
        cells = [
            f"{mix.get(k, 0)}" + (f" of {needed[k]:.0f}" if k in needed else "") for k in KINDS
        ]
        edge = str(fact["edge"]) if fact["engine"] == "gluon" else ""
        rows.append([*title(fact), *cells, str(sum(mix.values())), edge])
    print(table(["", "kernel", "head_dim", "pass", *KINDS, "all", "masked"], rows), end="\n\n")
    columns = ["products", "instructions", "exponentials", "estimate", "measured"]
    found = json.loads(RESULT.read_text())
    print(table(["head_dim", "pass", "kernel", *columns], estimates(facts, found)))


if __name__ == "__main__":
    main()
