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
from ringattn.planning.segments import Segments
from ringattn.planning.state_exchange import StateExchange

_GRID = 512  # pixels of a mask on each axis at most
_SEGMENTS = 24  # of a picture of summaries at most
_LANES = 32  # ranks of a timeline at most


def colours(count: int) -> list:
    """One colour per rank."""
    if count <= 10:
        return [matplotlib.colormaps["tab10"](i) for i in range(count)]
    return [matplotlib.colormaps["turbo"](i / (count - 1)) for i in range(count)]


def draw_plans(
    plans: LayerPlans,
    shape: AttentionShape,
    file: str,
    received: Mapping[str, Sequence[int]] | None = None,
    exchanges: Mapping[str, StateExchange] | None = None,
) -> None:
    """For each kind of layer the mask coloured by rank, the work per rank and the timeline of the
    forward; of one with a state its segments, and the bytes that each rank receives
    (``received``) and how their states are exchanged (``exchanges``)."""
    count = len(plans) + len(plans.segments)
    figure = Figure(figsize=(15, 4.6 * count), layout="constrained")
    rows = figure.subplots(count, 3, width_ratios=(4, 3, 6), squeeze=False)
    for (left, middle, right), (kind, segments) in zip(
        rows[len(plans) :], plans.segments.items(), strict=True
    ):
        draw_segments(left, segments)
        draw_received(middle, received[kind])
        draw_summaries(right, exchanges[kind])
        left.set_title(f"{plans.states[kind]} layers of kind {kind}", fontsize=10)
    for (left, middle, right), (kind, plan) in zip(rows, plans.items(), strict=False):
        draw_mask(left, plan)
        draw_work(middle, plan)
        draw_timeline(right, plan, shape, usual())
        if count > 1:
            left.set_title(f"{plans.counts[kind]} layers of kind {kind}", fontsize=10)
    title = f"{plans.layout.name}, {plans.world} ranks, {plans.layout.n:,} tokens"
    if plans:
        mask = plans.first.mask
        title = (
            f"{plans.schedule}, {plans.layout.name}, ulysses {plans.ulysses}, {plans.world} ranks, "
            f"{mask.n_q:,} x {mask.n_k:,} tokens"
        )
    if len(plans) > 1 or (plans and plans.segments):
        of = "attention of all" if plans.segments else "all"
        title += f"; {of} layers: largest work / mean {plans.imbalance:.3f}"
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


def draw_segments(axis: Axes, segments: Segments) -> None:
    """The sequence from left to right, each segment in the row and colour of its rank; a black line
    where a document begins."""
    palette = colours(segments.world)
    for segment in segments.all:
        run = segment.run
        axis.barh(segment.rank, len(run), 0.8, run.start, color=palette[segment.rank],
                  edgecolor="white", linewidth=0.4)  # fmt: skip
        for start in segment.starts:
            axis.plot([start, start], [segment.rank - 0.45, segment.rank + 0.45], "k", lw=1)
    axis.invert_yaxis()
    axis.set_xlabel("tokens (black: a document begins)")
    axis.set_ylabel("rank")


def draw_received(axis: Axes, received: Sequence[int]) -> None:
    """Bytes that each rank receives in the forward of a layer with a state."""
    kib = np.array(received) / 1024
    axis.bar(range(len(kib)), kib, color=colours(len(kib)))
    axis.set_xlabel("rank")
    axis.set_title("KiB received in the forward: states and halos", fontsize=10)


def draw_summaries(axis: Axes, exchange: StateExchange) -> None:
    """What each segment reads in the forward, in all steps: an arrow from whose summary to whose
    first state it makes, grey where both are of one rank."""
    segments, prefixes = exchange.segments, exchange.forward
    palette, shown = colours(segments.world), segments.all[:_SEGMENTS]
    for segment in shown:
        axis.plot(segment.number, segment.rank, "o", color=palette[segment.rank], zorder=3)
        for step in range(prefixes.steps):
            for number in prefixes.reads(step, segment.number):
                source = segments.all[number]
                own = source.rank == segment.rank
                axis.annotate(
                    "", (segment.number, segment.rank), (source.number, source.rank),
                    arrowprops={"arrowstyle": "->", "alpha": 0.5,
                                "color": "#bbbbbb" if own else palette[source.rank]},
                )  # fmt: skip
    axis.invert_yaxis()
    more = f" (the first {_SEGMENTS})" if len(segments.all) > _SEGMENTS else ""
    axis.set_xlabel(f"segment, in the order of the sequence{more}")
    axis.set_ylabel("rank")
    steps = "1 step" if prefixes.steps == 1 else f"{prefixes.steps} steps"
    axis.set_title(f"summaries that make first states: {exchange.way}, {steps}", fontsize=10)


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
