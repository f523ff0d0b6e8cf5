"""On paper: the fastest schedule for up to 1,024 H100 and 16M tokens, as a picture and tables.

    python benchmarks/paper_scaling.py [--out docs/schedules.png]

One attention layer, forward and backward, 32 heads on 8 K/V heads of 128, bf16, causal, zigzag, all
ranks share one sequence; hardware is configs/machines/h100.yaml. Every schedule with every ulysses
degree is simulated. Left: the fastest; a cell says its degree and the share of its time that is not
kernel. Schedules within 1 % of each other are a tie: then the lowest degree counts, and the ring
before others. Right: at 1,024 ranks, what each takes over the kernel alone, without Ulysses;
dashed, the best with.
"""

import argparse
from pathlib import Path

from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

import ringattn as ra
from ringattn import cost
from ringattn.cost.presets import load
from ringattn.planning.head_split import legal_degrees
from ringattn.planning.schedules import BUILDERS

ROOT = Path(__file__).resolve().parent.parent
SHAPE = cost.AttentionShape(32, 8, 128, itemsize=2)
LENGTHS = [2**k for k in range(16, 25)]
RANKS = [2**k for k in range(3, 11)]
COLOURS = {"ring": "#4878a8", "double_ring": "#e08e45", "all_gather": "#9a9a9a",
           "direct": "#6aa56e"}  # fmt: skip
TIE = 0.01


def short(n):
    return f"{n // 2**20}M" if n >= 2**20 else f"{n // 2**10}k"


def cell(n, world, hardware):
    """{(schedule, ulysses): timeline}."""
    mask = ra.masks.causal(n)
    layout = ra.layouts.zigzag(n, world)
    found = {}
    for ulysses in legal_degrees(world, SHAPE.heads):
        if hardware.node_size % ulysses and ulysses % hardware.node_size:
            continue
        for name in BUILDERS:
            if name == "double_ring" and world <= hardware.node_size:
                continue  # there is one node
            if world == ulysses and name != "ring":
                continue  # nothing is left to be exchanged
            plan = ra.make_plan(mask, layout, name, ulysses, node_size=hardware.node_size)
            found[name, ulysses] = cost.simulate(plan, SHAPE, hardware, ranks=cost.sample(plan))
    return found


def winner(found):
    best = min(line.seconds for line in found.values())
    near = {key: line for key, line in found.items() if line.seconds <= best * (1 + TIE)}
    # Of equals: the lowest degree (fewest all-to-alls), then the order of the schedules.
    return min(near, key=lambda key: (key[1], list(BUILDERS).index(key[0])))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "schedules.png")
    out = parser.parse_args().out
    hardware = load("h100")
    cells = {(n, world): cell(n, world, hardware) for n in LENGTHS for world in RANKS}
    names = list(BUILDERS)
    figure = Figure(figsize=(14, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    wins = {key: winner(found) for key, found in cells.items()}
    grid = [[names.index(wins[n, world][0]) for world in RANKS] for n in reversed(LENGTHS)]
    left.imshow(grid, cmap=ListedColormap([COLOURS[name] for name in names]), vmin=0,
                vmax=len(names) - 1, aspect="auto", alpha=0.75)  # fmt: skip
    print("| tokens | " + " | ".join(f"{world} ranks" for world in RANKS) + " |")
    print("|---|" + "---|" * len(RANKS))
    for row, n in enumerate(reversed(LENGTHS)):
        texts = []
        for column, world in enumerate(RANKS):
            (name, ulysses), found = wins[n, world], cells[n, world]
            line = found[name, ulysses]
            share = line.exposed / line.seconds
            left.text(column, row, f"u{ulysses}\n{share:.0%}", ha="center", va="center", fontsize=8)
            texts.append(f"{name} u{ulysses}, {share:.0%}")
        print(f"| {short(n)} | {' | '.join(texts)} |")
    left.set_xticks(range(len(RANKS)), RANKS)
    left.set_yticks(range(len(LENGTHS)), [short(n) for n in reversed(LENGTHS)])
    left.set_xlabel("ranks that share the sequence (nodes of 8)")
    left.set_ylabel("tokens")
    left.set_title("fastest schedule, its ulysses degree, share of its time that is not kernel",
                   fontsize=10)  # fmt: skip
    left.legend(handles=[Patch(color=COLOURS[name], label=name) for name in names], fontsize=8,
                loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=len(names))  # fmt: skip
    world = RANKS[-1]
    print(f"\n{world} ranks, time over the kernel alone\n")
    print("| tokens | " + " | ".join(f"{name} u1" for name in names) + " | best |")
    print("|---|" + "---|" * (len(names) + 1))
    curves = {name: [] for name in (*names, "best of any degree")}
    for n in LENGTHS:
        found = cells[n, world]
        kernel = min(line.compute for line in found.values())
        ratios = {name: found[name, 1].seconds / kernel for name in names}
        best = min(found, key=lambda key: found[key].seconds)
        ratios["best of any degree"] = found[best].seconds / kernel
        for name, ratio in ratios.items():
            curves[name].append(ratio)
        *each, least = (f"{ratio:.2f}" for ratio in ratios.values())
        print(f"| {short(n)} | {' | '.join(each)} | {least} ({best[0]} u{best[1]}) |")
    for name, values in curves.items():
        style = "-" if name in COLOURS else "--"
        right.plot(LENGTHS, values, style, marker="o", color=COLOURS.get(name, "black"), label=name)
    right.axhline(1, color="black", linewidth=0.8)
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xticks(LENGTHS, [short(n) for n in LENGTHS])
    right.set_xlabel("tokens")
    right.set_title(f"{world} ranks: time over the kernel alone, heads not split", fontsize=10)
    right.legend(fontsize=8)
    figure.savefig(out, dpi=80)


if __name__ == "__main__":
    main()
