"""Pictures of runs; each is a function from runs to a figure, or None where it has nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ringattn.report.read import RunRecord

PARTS = {"compute": "#4878a8", "exchange": "#b3423a", "engine": "#7a7a7a", "data": "#c9b458"}
Value = Callable[[RunRecord], float | None]


def draw(runs: list[RunRecord]) -> dict[str, Figure]:
    """All that these runs have something for, by file name."""
    done = [run for run in runs if run.metrics and run.facts]
    if not done:
        return {}
    figures = {
        "scaling": scaling(done),
        "parts": parts(done),
        "predicted": predicted(done),
        "loss": loss(done),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def scaling(runs: list[RunRecord]) -> Figure:
    """Speed, memory, exposed exchange and efficiency against length, ranks or whatever varies."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    (a, b), (c, d) = figure.subplots(2, 2)
    key = _axis(runs)
    _lines(a, runs, key, lambda r: r.median("tokens_per_s"),
           lambda r: r.predicted.get("tokens_per_s"), "tokens/s, all ranks")  # fmt: skip
    _lines(b, runs, key, lambda r: r.peak_memory and r.peak_memory / 2**30,
           lambda r: r.predicted.get("peak_memory_bytes", 0) / 2**30 or None,
           "peak memory of a rank, GiB")  # fmt: skip
    _lines(c, runs, key, exposed, lambda r: _share(r.predicted), "exposed exchange, share of step")
    _lines(d, runs, key, lambda r: r.median("mfu"), lambda r: r.predicted.get("mfu"),
           "MFU: share of peak")  # fmt: skip
    for axis in (a, b, c, d):
        axis.set_ylim(0, 1.08 * axis.get_ylim()[1])  # the highest point whole
    if any(run.predicted for run in runs):
        figure.suptitle("measured (solid) and predicted (dashed)", fontsize=10)
    return figure


def exposed(run: RunRecord) -> float | None:
    """Share of a step in which rank 0 waits for attention's exchanges."""
    waits, step = run.median("exchange_s"), run.median("step_s")
    return None if waits is None or not step else waits / step


def _share(predicted: dict[str, Any]) -> float | None:
    return predicted["exposed_s"] / predicted["seconds"] if predicted else None


def parts(runs: list[RunRecord]) -> Figure:
    """Where the time of a step goes, by the median of each part."""
    figure = Figure(figsize=(9, 1.4 + 0.3 * len(runs)), layout="constrained")
    axis = figure.subplots()
    at = [0.0] * len(runs)
    names = [run.name for run in runs]
    for part, colour in PARTS.items():
        sizes = [run.median(f"{part}_s") or 0.0 for run in runs]
        axis.barh(names, sizes, left=at, color=colour, label=part)
        at = [x + size for x, size in zip(at, sizes, strict=True)]
    axis.invert_yaxis()
    axis.set_xlabel("seconds of a step (rank 0)")
    figure.legend(fontsize=8, loc="outside upper center", ncols=len(PARTS))
    return figure


def predicted(runs: list[RunRecord]) -> Figure | None:
    """Prediction against measurement: the closer to the diagonal, the better."""
    both = [run for run in runs if run.predicted and run.median("step_s")]
    if not both:
        return None
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    pairs: tuple[tuple[Axes, Value, Value, str], ...] = (
        (left, lambda r: r.median("step_s"), lambda r: r.guess, "seconds of a step"),
        (right, lambda r: r.peak_memory / 2**30,
         lambda r: r.predicted["peak_memory_bytes"] / 2**30, "GiB of a rank"),
    )  # fmt: skip
    for axis, real, guess, label in pairs:
        x, y = [real(run) for run in both], [guess(run) for run in both]
        axis.scatter(x, y, color="#4878a8")
        ends = [min(x + y) * 0.9, max(x + y) * 1.1]
        axis.plot(ends, ends, color="black", linewidth=0.8)
        axis.fill_between(ends, [e * 0.8 for e in ends], [e * 1.2 for e in ends], color="#dddddd",
                          zorder=0, label="within 20 %")  # fmt: skip
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel(f"measured {label}")
        axis.set_ylabel("predicted")
        axis.legend(fontsize=8)
    return figure


def loss(runs: list[RunRecord]) -> Figure | None:
    """All curves on one axis, over tokens."""
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    axis = figure.subplots()
    for run, colour in zip(runs, _colours(len(runs)), strict=True):
        points = [(s["tokens_seen"], s["loss"]) for s in run.metrics if s["loss"] is not None]
        axis.plot(*zip(*points, strict=True), color=colour, label=run.name, linewidth=1)
    axis.set_xlabel("tokens")
    axis.set_ylabel("loss, nats per token")
    axis.legend(fontsize=7)
    return figure


def _axis(runs: list[RunRecord]) -> str:
    """What the x axis is: the length if it varies by itself, else ranks, else the points."""
    lengths, ranks = {run.seq_len for run in runs}, {run.ranks for run in runs}
    if len(ranks) > 1:
        return "ranks"
    return "tokens" if len(lengths) > 1 else "point"


def _lines(
    axis: Axes, runs: list[RunRecord], key: str, real: Value, guess: Value, label: str
) -> None:
    axis.set_ylabel(label)
    if key == "point":
        at = range(len(runs))
        axis.bar(at, [real(run) or 0 for run in runs], color="#4878a8", label="measured")
        guesses = [guess(run) for run in runs]
        if any(guesses):
            axis.plot(at, guesses, "k_", markersize=14, label="predicted")
        names = [run.name.replace("parallel.", "").replace("attention.", "") for run in runs]
        axis.set_xticks(list(at), names, rotation=30, ha="right", fontsize=7)
        return
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(_group(run, key), []).append(run)
    for (name, some), colour in zip(groups.items(), _colours(len(groups)), strict=True):
        some = sorted(some, key=lambda r: _x(r, key))
        x = [_x(run, key) for run in some]
        axis.plot(x, [real(run) for run in some], marker="o", color=colour, label=name or None)
        axis.plot(x, [guess(run) for run in some], "--", color=colour, linewidth=1)
    axis.set_xscale("log", base=2)
    ticks = sorted({_x(run, key) for run in runs})
    axis.set_xticks(ticks, [f"{t // 1024}k" if t % 1024 == 0 else str(t) for t in ticks])
    axis.minorticks_off()
    axis.set_xlabel("ranks" if key == "ranks" else "tokens of a sequence")
    if len(groups) > 1:
        axis.legend(fontsize=7)


def _x(run: RunRecord, key: str) -> int:
    return run.ranks if key == "ranks" else run.seq_len


def _group(run: RunRecord, key: str) -> str:
    own = {"ranks": ("ranks",), "tokens": ("seq_len",)}[key]
    return ", ".join(f"{k}={v}" for k, v in run.varied.items() if k not in own)


def _colours(count: int) -> Iterable[Any]:
    name = "tab10" if count <= 10 else "turbo"
    palette = matplotlib.colormaps[name]
    return [palette(i if count <= 10 else i / (count - 1)) for i in range(count)]
