"""The tables of docs/kernels.md and of the README about compiled kernels: no GPU needed.

    python benchmarks/kernel_report.py

Runs `ringattn kernels` (about two minutes on two cores) and prints Markdown: what every line in
bf16 compiles to, added to a running sum; then the instructions of a warp in one turn of the loop
over unmasked tiles, beside what the algorithm takes at least.
"""

import json
import subprocess
import sys

WHICH = ["bits=16", "pointers=no", "softcap=no", "head_dim=64,128,192/128,256"]
PASSES = {"forward": "forward", "backward_keys": "dk, dv", "backward_queries": "dq"}
KINDS = ("matrix", "exp2", "float", "convert", "memory", "other")


def table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def title(fact: dict) -> list[str]:
    d, dv = fact["head_dim"], fact["v_dim"]
    return [fact["arch"], f"{d}" if d == dv else f"{d}/{dv}", PASSES[fact["name"]]]


def main() -> None:
    command = [sys.executable, "-m", "ringattn", "kernels", *WHICH, "--json"]
    facts = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout)
    order, archs = list(PASSES), ["sm_80", "sm_90", "sm_100"]
    facts.sort(
        key=lambda f: (archs.index(f["arch"]), f["head_dim"], f["v_dim"], order.index(f["name"]))
    )
    rows = []
    for fact in filter(lambda f: f["adds"], facts):
        products = ", ".join(f"{n} {kind}" for kind, n in fact["matrix"].items())
        shared = f"{fact['shared'] / 1024:.0f} of {fact['shared_limit'] / 1024:.0f}"
        numbers = [str(fact["registers"]), str(fact["spill"]), shared, products]
        tile = f"{fact['m']} \u00d7 {fact['n']}"
        rows.append([*title(fact), tile, *numbers, f"{fact['intensity']:.0f}"])
    columns = ["tile", "registers", "spill", "shared KiB", "products", "FLOP/B"]
    print(table(["", "head_dim", "pass", *columns], rows), end="\n\n")
    rows = []
    for fact in facts:
        if fact["adds"] or fact["arch"] == "sm_80" or fact["head_dim"] > 128:
            continue
        mix, needed = fact["mix"], fact["needed"]
        cells = [
            f"{mix.get(k, 0)}" + (f" of {needed[k]:.0f}" if k in needed else "") for k in KINDS
        ]
        rows.append([*title(fact), *cells, str(sum(mix.values()))])
    print(table(["", "head_dim", "pass", *KINDS, "all"], rows))


if __name__ == "__main__":
    main()
