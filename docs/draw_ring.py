"""Draws docs/ring.png: what four ranks hold and compute at every step of a causal ring.

    python docs/draw_ring.py        (needs matplotlib: pip install -e '.[bench]')

The squares are read off a real plan, so the picture cannot say anything else than the code.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

import ringattn as ra

WORLD, N = 4, 32
COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44"]


def main() -> None:
    plan = ra.make_plan(ra.masks.causal(N), ra.layouts.zigzag(N, WORLD))
    colours = ListedColormap(["#f2f2f2", *COLOURS])
    figure, axes = plt.subplots(1, WORLD + 1, figsize=(15, 3.9), layout="constrained")
    layout = plan.layout
    for index, axis in enumerate(axes):
        picture = np.zeros((N, N), int)
        for rank in range(WORLD):
            steps = plan.steps(rank)
            for step in steps if index == WORLD else steps[index : index + 1]:
                own, keys = layout.positions(rank), layout.positions(step.owner)
                local = ra.masks.from_slices(step.slices, len(own), len(keys)).to_dense()
                picture[np.ix_(own, keys)] += local * (rank + 1)
        axis.imshow(picture, cmap=colours, vmin=0, vmax=WORLD)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_xlabel("keys")
        if index == WORLD:
            axis.set_title("together: every pair once")
            continue
        areas = [sum(part.area for part in plan.steps(r)[index].slices) for r in range(WORLD)]
        held = ", ".join(f"{plan.steps(r)[index].owner}" for r in range(WORLD))
        axis.set_title(f"step {index}: ranks 0-3 hold\nK/V of {held}; pairs {areas}", fontsize=9)
    axes[0].set_ylabel("queries")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS]
    figure.legend(
        handles,
        [f"computed by rank {rank}" for rank in range(WORLD)],
        loc="outside lower center",
        ncols=WORLD,
    )
    figure.savefig(Path(__file__).with_name("ring.png"), dpi=80)


if __name__ == "__main__":
    main()
