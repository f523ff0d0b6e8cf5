"""Pictures of plans and of verification, drawn from the plan itself. matplotlib only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from ringattn import cost
from ringattn.cost import AttentionShape, Hardware
from ringattn.cost.presets import usual
from ringattn.planning.layer_plans import LayerPlans
from ringattn.planning.plan import Plan

_GRID = 512  # pixels of a mask on each axis at most
_LANES = 32  # ranks of a timeline at most


def colours(count: int) -> list:
    """One colour per rank."""
    if count <= 10:
        return [matplotlib.colormaps["tab10"](i) for i in range(count)]
    return [matplotlib.colormaps["turbo"](i / (count - 1)) for i in range(count)]


def draw_plans(plans: LayerPlans, shape: AttentionShape, file: str) -> None:
    """For each kind of layer the mask coloured by rank, the work per rank and the timeline of the
    forward."""
    figure = Figure(figsize=(15, 4.6 * len(plans)), layout="constrained")
    rows = figure.subplots(len(plans), 3, width_ratios=(4, 3, 6), squeeze=False)
    for (left, middle, right), (kind, plan) in zip(rows, plans.items(), strict=True):
        draw_mask(left, plan)
        draw_work(middle, plan)
        draw_timeline(right, plan, shape, usual())
        if len(plans) > 1:
            left.set_title(f"{plans.counts[kind]} layers of kind {kind}", fontsize=10)
    plan = plans.first
    title = (
        f"{plans.schedule}, {plan.layout.name}, ulysses {plans.ulysses}, {plan.world} ranks, "
        f"{plan.mask.n_q:,} x {plan.mask.n_k:,} tokens"
    )
    if len(plans) > 1:
        title += f"; all layers: largest work / mean {plans.imbalance:.3f}"
    figure.suptitle(title, fontsize=11)
    figure.savefig(file, dpi=90)


def draw_mask(axis: Axes, plan: Plan) -> None:
    """Which rank computes which pairs; sampled where a pixel holds many."""
    mask, layout = plan.mask, plan.layout
    rows, cols = (
        np.linspace(0, n - 1, min(n, _GRID)).astype(np.int64) for n in (mask.n_q, mask.n_k)
    )
    owner = np.zeros(mask.n_q, np.int64)
    for run, rank in layout.owned:
        owner[run.start : run.stop : run.step] = rank + 1
    seen = np.zeros((len(rows), len(cols)), bool)
    for part in mask.slices:
        on_q, on_k = (
            np.flatnonzero((at >= run.start) & (at < run.stop) & ((at - run.start) % run.step == 0))
            for at, run in ((rows, part.q), (cols, part.k))
        )
        apart = cols[on_k][None, :] - rows[on_q][:, None]
        seen[np.ix_(on_q, on_k)] |= (apart >= part.lo) & (apart <= part.hi)
    picture = np.where(seen, owner[rows][:, None], 0)
    palette = ListedColormap(["#f2f2f2", *colours(plan.world)])
    axis.imshow(
        picture, cmap=palette, vmin=0, vmax=plan.world, interpolation="nearest", aspect="auto"
    )
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlabel("keys")
    axis.set_ylabel("queries, coloured by rank")


def draw_work(axis: Axes, plan: Plan) -> None:
    """Pairs per rank over their mean."""
    areas = np.array([plan.area(rank) for rank in range(plan.world)], float)
    axis.bar(range(plan.world), areas / (areas.mean() or 1), color=colours(plan.world))
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xlabel("rank")
    axis.set_title(f"work / mean (largest {plan.imbalance:.3f})", fontsize=10)


def draw_timeline(axis: Axes, plan: Plan, shape: AttentionShape, hardware: Hardware) -> None:
    """Compute (colour) and exchange (grey) of every step of the forward, estimated."""
    palette = colours(plan.world)
    ranks = sorted({i * plan.world // _LANES for i in range(_LANES)})
    line = cost.simulate(plan, shape, hardware, "bf16", plan.node_size, ranks, spans=True)
    for span in line.spans:
        if span.of != "forward" or span.kind == "wait":
            continue
        place, height, colour = -0.2, 0.4, palette[span.rank]
        if span.kind != "compute":
            place, height, colour = 0.2, 0.3, "#999999"
        axis.barh(span.rank + place, 1e6 * (span.end - span.begin), height, 1e6 * span.begin,
                  color=colour, edgecolor="white", linewidth=0.4)  # fmt: skip
    axis.invert_yaxis()
    axis.set_xlabel(f"microseconds of the forward, estimated: {hardware.name}")
    axis.set_ylabel("rank")
    axis.set_title("compute (colour) and exchange (grey)", fontsize=10)


def draw_errors(
    curves: Mapping[str, Sequence[float]], ranks: Sequence[int], title: str, file: str
) -> None:
    """Error against float64 over the error of one kernel call, by number of ranks."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for name, values in curves.items():
        axis.plot(ranks, values, marker="o", label=name)
    axis.axhline(1.1, color="black", linestyle="--", linewidth=0.8, label="limit 1.1")
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(ranks), [str(rank) for rank in ranks])
    axis.set_ylim(0, max(1.5, 1.1 * max(max(values) for values in curves.values())))
    axis.set_xlabel("ranks")
    axis.set_ylabel("RMS error / that of one kernel call")
    axis.set_title(title, fontsize=9)
    axis.legend()
    figure.savefig(file, dpi=100)
