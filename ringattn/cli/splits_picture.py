"""The ranking of splits as a picture. matplotlib only."""

from __future__ import annotations

from matplotlib.figure import Figure

from ringattn.training.search import Split

_BARS = 12
COLOURS = {
    "matrix products": "#4878a8",
    "elementwise": "#9ec1de",
    "attention kernel": "#e08e45",
    "exposed exchange": "#b3423a",
    "engine": "#7a7a7a",
    "offload": "#c9b458",
}


def draw(ranked: list[Split], file: str) -> None:
    """Seconds by part and million tokens of the best splits, and what they hold in memory."""
    best = [split.step for split in ranked[:_BARS]]
    figure = Figure(figsize=(13, 1.6 + 0.36 * len(best)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2), sharey=True)
    names = [
        f"{p.setup.cp} x {p.setup.world // p.setup.cp}, u {p.setup.ulysses}, {p.setup.schedule}, "
        f"{p.setup.layout}"
        for p in best
    ]
    at = [0.0] * len(best)
    for part, colour in COLOURS.items():
        sizes = [1e6 * p.parts[part] / p.tokens for p in best]
        left.barh(names, sizes, left=at, color=colour, label=part)
        at = [a + size for a, size in zip(at, sizes, strict=True)]
    left.invert_yaxis()
    left.set_xlabel("seconds per million tokens, all ranks")
    left.legend(fontsize=8, loc="lower right")
    at = [0.0] * len(best)
    for part, colour in zip(("states", "kept", "working"), ("#4878a8", "#e08e45", "#9ec1de"),
                            strict=True):  # fmt: skip
        sizes = [getattr(p.memory, part) / 2**30 for p in best]
        right.barh(names, sizes, left=at, color=colour, label=part)
        at = [a + size for a, size in zip(at, sizes, strict=True)]
    hardware, setup = best[0].hardware, best[0].setup
    room = (hardware.memory - hardware.framework) / 2**30
    right.axvline(room, color="black", linestyle="--", linewidth=0.8, label="what there is")
    right.set_xlabel("GiB per rank")
    right.legend(fontsize=8)
    figure.suptitle(
        f"{best[0].model.parameters / 1e9:.1f} B parameters, {ranked[0].run.seq_len:,} tokens, "
        f"{setup.world} x {hardware.name}: cp x dp, ulysses, schedule, layout",
        fontsize=10,
    )
    figure.savefig(file, dpi=90)
