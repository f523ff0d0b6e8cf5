"""Pictures of an evaluation: accuracy over depth and length, loss by position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure


def draw(run_dir: Path, values: dict[str, Any]) -> dict[str, Path]:
    """Draws what a line of eval.jsonl has; {name: file}."""
    files = {}
    cells = values.get("probes", [])
    for task in dict.fromkeys(cell["task"] for cell in cells):
        files[task] = run_dir / f"{task}.png"
        own = [cell for cell in cells if cell["task"] == task]
        heat_map(own, f"{task}, step {values['step']}").savefig(files[task], dpi=120)
    if "loss_by_position" in values:
        files["loss_by_position"] = run_dir / "loss_by_position.png"
        figure = by_position(values["loss_by_position"], f"held out, step {values['step']}")
        figure.savefig(files["loss_by_position"], dpi=120)
    return files


def heat_map(cells: list[dict[str, Any]], title: str, axes: Any = None) -> Figure:
    """Accuracy of one task: depth downwards, length to the right. Into ``axes`` if given."""
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    if axes is None:
        size = (2.4 + 0.9 * len(lengths), 1.4 + 0.45 * len(depths))
        axes = Figure(figsize=size, layout="constrained").subplots()
    grid = [[float("nan")] * len(lengths) for _ in depths]
    for cell in cells:
        row, column = depths.index(cell["depth"]), lengths.index(cell["length"])
        grid[row][column] = cell["accuracy"]
        shade = "white" if cell["accuracy"] < 0.5 else "black"
        axes.text(column, row, f"{cell['accuracy']:.0%}", ha="center", va="center", color=shade)
    colours = matplotlib.colormaps["viridis"]
    axes.imshow(grid, vmin=0, vmax=1, cmap=colours, aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set(xlabel="length (tokens)", ylabel="depth", title=title)
    return axes.figure


def by_position(buckets: list[dict[str, Any]], title: str) -> Figure:
    axes = Figure(figsize=(5, 3), layout="constrained").subplots()
    axes.plot([bucket["below"] for bucket in buckets], [b["loss"] for b in buckets], "o-")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="position below (tokens of context)", ylabel="loss (nats)", title=title)
    axes.grid(alpha=0.3)
    return axes.figure
