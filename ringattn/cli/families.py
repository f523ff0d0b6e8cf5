"""``ringattn estimate --families``: a run with each family of attention in all of its layers: time
of a layer, what a rank receives, memory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ringattn.cli.estimate import as_given, run_of
from ringattn.cli.request import RequestError
from ringattn.cli.splits_picture import COLOURS
from ringattn.cli.tables import wide_console
from ringattn.cost.hardware import Hardware
from ringattn.cost.step import Prediction
from ringattn.training.run import TrainingRun

_PARTS = ("matrix products", "elementwise", "attention kernel", "exposed exchange")


def _kind(keys: str) -> list[str]:
    return [f"attention.kinds={{all:{{{keys}}}}}", "attention.pattern=[all]"]


# What each is given, with sizes that its authors train with.
FAMILIES = {
    "causal": [],
    "sliding_window 4,096": ["attention.window=4096"],
    "pooled, block 256, near 4": _kind("mixer:pooled,block:256,near:4"),
    "pooled, 3 levels from 128": _kind("mixer:pooled,block:128,near:4,levels:3,ratio:8"),
    "moba, block 512, top_k 12": _kind("mixer:moba,block:512,top_k:12"),
    "nsa, block 64, top_k 16": _kind("mixer:nsa,block:64,top_k:16,window:512"),
    "hashed, chunk 256, 2 rounds": _kind("mixer:hashed,block:256,buckets:1024,rounds:2"),
    "scatterbrain, block 512": _kind("mixer:scatterbrain,block:512,features:128"),
    "adaptive_span 4,096": _kind("mixer:adaptive_span,window:4096"),
    "gated_delta": _kind("mixer:gated_delta"),
}


def predicted(keys: Sequence[str], world: int, hardware: Hardware) -> dict[str, Prediction]:
    """The step of the run that ``keys`` say, with each family. Raises ValueError where they name
    masks or kinds themselves."""
    if named := [key for key in keys if key.startswith("attention.") or key.startswith("~atten")]:
        raise RequestError(f"{named[0]}: with --families each family has its own")
    if not any(key.startswith("parallel.schedule=") for key in keys):
        keys = [*keys, "parallel.schedule=auto"]  # a window by a ring would tell of the ring
    steps = {}
    for name, own in FAMILIES.items():
        run: TrainingRun = run_of([*keys, *own])[0]
        steps[name] = as_given(replace(run, ranks=None), world, hardware).step
    return steps


def row(step: Prediction) -> dict[str, float]:
    """Of one layer: ms forward and backward, without engine, loss and offloading; bytes that a rank
    receives. Of the whole step: bytes of memory."""
    layers = step.model.layers
    ms = {part: 1e3 * step.parts[part] / layers for part in _PARTS}
    of_layers = ("attention forward", "attention backward", "states")
    received = sum(step.received.get(part, 0.0) for part in of_layers)
    return {
        "layer_ms": sum(ms.values()),
        **{part.replace(" ", "_") + "_ms": took for part, took in ms.items()},
        "received_bytes": received / layers,
        "peak_memory_bytes": step.peak_memory,
    }


def compare(
    keys: Sequence[str], world: int, hardware: Hardware, plot: str | None, machine: bool
) -> int:
    """The command."""
    steps = predicted(keys, world, hardware)
    rows = {name: row(step) for name, step in steps.items()}
    if plot:
        draw(rows, next(iter(steps.values())), plot)
    if machine:
        print(json.dumps({"hardware": hardware.name, "ranks": world, "families": rows}))
        return 0
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for title in ("family", "layer ms", "kernel ms", "exposed ms", "MB received", "GiB", ""):
        side = "left" if title in ("family", "") else "right"
        table.add_column(title, justify=side, no_wrap=True)
    for name, own in rows.items():
        table.add_row(
            name, f"{own['layer_ms']:,.1f}", f"{own['attention_kernel_ms']:,.1f}",
            f"{own['exposed_exchange_ms']:,.1f}", f"{own['received_bytes'] / 1e6:,.1f}",
            f"{own['peak_memory_bytes'] / 2**30:.1f}",
            "does not fit" if steps[name].misfit else "",
        )  # fmt: skip
    console = wide_console()
    console.print(table)
    console.print(
        "Each family in all layers; a layer forward and backward, recomputed where the run does; "
        "GiB of a rank in the whole step. A choice has a stand-in: as many pairs, spread over all "
        "that may be chosen.",
        soft_wrap=True,
    )
    return 0


def draw(rows: Mapping[str, Mapping[str, float]], step: Prediction, file: str) -> None:
    """Time of a layer by part, and memory of a rank. matplotlib only."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2), sharey=True)
    names, at = list(rows), [0.0] * len(rows)
    for part in _PARTS:
        sizes: list[Any] = [rows[name][part.replace(" ", "_") + "_ms"] for name in names]
        left.barh(names, sizes, left=at, color=COLOURS[part], label=part)
        at = [a + size for a, size in zip(at, sizes, strict=True)]
    left.invert_yaxis()
    left.set_xscale("symlog", linthresh=200)
    left.set_xlabel("ms of a layer, forward and backward (linear up to 200)")
    left.legend(fontsize=7, loc="lower right")
    right.barh(names, [rows[name]["peak_memory_bytes"] / 2**30 for name in names], color="#7a7a7a")
    right.set_xlabel("GiB of a rank, whole step")
    figure.suptitle(
        f"{step.model.parameters / 1e9:.1f} B parameters, {step.plans.layout.n:,} tokens on "
        f"{step.setup.world} x {step.hardware.name} (predicted)",
        fontsize=10,
    )
    figure.savefig(file, dpi=100)
