"""Draws the pictures of README.md and docs/attention.md.

    python docs/draw.py

Every square is read off a real plan, so a picture cannot say anything else than the code.
"""

from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

import ringattn as ra
from ringattn.cli.pictures import colours, draw_mask, draw_work

HERE = Path(__file__).parent
WORLD = 4
GREY = "#f2f2f2"


def ring() -> None:
    """What four ranks hold and compute at every step of a causal ring."""
    n = 32
    plan = ra.make_plan(ra.masks.causal(n), ra.layouts.zigzag(n, WORLD))
    layout, palette = plan.layout, ListedColormap([GREY, *colours(WORLD)])
    figure = Figure(figsize=(15, 3.9), layout="constrained")
    axes = figure.subplots(1, WORLD + 1)
    together = np.zeros((n, n), int)
    for index in range(WORLD):
        picture, held, areas = np.zeros((n, n), int), [], []
        for rank in range(WORLD):
            step, owner = plan.steps(rank)[index], (rank - index) % WORLD
            own, keys = layout.positions(rank), layout.positions(owner)
            for band in step.bands:
                q = own[band.q.start : band.q.stop : band.q.step]
                k = keys[band.k.start : band.k.stop : band.k.step]
                apart = np.arange(len(k)) - np.arange(len(q))[:, None]
                inside = (apart >= band.lo) & (apart <= band.hi)
                picture[np.ix_(q, k)] += inside * (rank + 1)
            held.append(str(owner))
            areas.append(sum(band.area for band in step.bands))
        together += picture
        title = f"step {index}: ranks 0-3 hold\nK/V of {', '.join(held)}; pairs {areas}"
        _show(axes[index], picture, palette, title)
    _show(axes[-1], together, palette, "together: every pair once")
    axes[0].set_ylabel("queries")
    _legend(figure)
    figure.savefig(HERE / "ring.png", dpi=80)


def _show(axis, picture, palette, title) -> None:
    axis.imshow(picture, cmap=palette, vmin=0, vmax=WORLD)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlabel("keys")
    axis.set_title(title, fontsize=9)


def _legend(figure, *more) -> None:
    patches = [Patch(color=c, label=f"rank {r}") for r, c in enumerate(colours(WORLD))]
    figure.legend(handles=[*patches, *more], loc="outside lower center", ncols=WORLD + len(more))


def layouts() -> None:
    """The same two masks on four layouts, and what that does to the work of each rank."""
    n = 2048
    masks = {
        "causal": ra.masks.causal(n),
        "packed documents": ra.masks.documents([60, 900, 30, 200, 110, 420, 40, 288]),
    }
    figure = Figure(figsize=(13, 8.4), layout="constrained")
    axes = figure.subplots(2 * len(masks), len(ra.layouts.NAMES), height_ratios=(3, 1) * 2)
    for row, (label, mask) in enumerate(masks.items()):
        for column, name in enumerate(ra.layouts.NAMES):
            plan = ra.make_plan(mask, ra.layouts.build(name, mask, WORLD))
            draw_mask(axes[2 * row, column], plan)
            draw_work(axes[2 * row + 1, column], plan)
            axes[2 * row, column].set_title(f"{name}, {label}", fontsize=10)
            axes[2 * row, column].set_ylabel("queries" if not column else "")
    _legend(figure)
    figure.savefig(HERE / "layouts.png", dpi=70)


def direct() -> None:
    """Which keys each rank holds, asks for, and receives without need."""
    n = 512
    mask = ra.masks.sliding_window(n, 80) | ra.masks.sinks(n, 16)
    figure = Figure(figsize=(13, 3.2), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, schedule in zip(axes, ("ring", "all_gather", "direct"), strict=True):
        plan = ra.make_plan(mask, ra.layouts.zigzag(n, WORLD), schedule)
        picture = np.zeros((WORLD, n), int)
        for rank in range(WORLD):
            # Ring and all-gather move whole blocks; direct moves the rows that are attended.
            for owner in range(WORLD):
                if owner == rank or not _arrives(plan, rank, owner):
                    continue
                if schedule != "direct":
                    picture[rank, plan.layout.positions(owner)] = WORLD + 1
            needed = [i for run in plan.partition.attended_keys[rank] for i in run.to_array()]
            picture[rank, needed] = WORLD + 2
            picture[rank, plan.layout.positions(rank)] = rank + 1
        palette = ListedColormap(["white", *colours(WORLD), "#cccccc", "#222222"])
        axis.imshow(
            picture, cmap=palette, vmin=0, vmax=WORLD + 2, aspect="auto", interpolation="nearest"
        )
        rows = [plan.recv_tokens(rank) for rank in range(WORLD)]
        axis.set_title(f"{schedule}: K/V rows received {rows}", fontsize=10)
        axis.set_xlabel("keys")
        axis.set_yticks(range(WORLD))
    axes[0].set_ylabel("rank")
    _legend(
        figure,
        Patch(color="#222222", label="received and attended"),
        Patch(color="#cccccc", label="received only"),
    )
    figure.savefig(HERE / "direct.png", dpi=80)


def _arrives(plan, rank: int, owner: int) -> bool:
    """Whether the block of ``owner`` comes to ``rank``, by whole blocks."""
    if plan.schedule == "ring":
        hop = (rank - owner) % WORLD
        return bool(plan.steps(rank)[hop - 1].recvs)
    return any(move.peer == owner for step in plan.steps(rank) for move in step.recvs)


if __name__ == "__main__":
    ring()
    layouts()
    direct()
