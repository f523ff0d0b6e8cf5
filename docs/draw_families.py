"""The code in the tables of docs/families.md: run, as a test does, and drawn.

    python docs/draw_families.py

A picture shows the weights that each token's output has of every token: v is the identity, so they
are what a mixer returns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import ringattn as ra
from ringattn import mixers
from ringattn.execution.carriers import VirtualWorld
from ringattn.planning import mask_text

HERE = Path(__file__).parent
N, HEADS, DIM, BLOCK = 48, 2, 8, 6


@dataclass(frozen=True)
class Row:
    """A method of a family; ``codes``: what asks for it, masks as calls of ``attend``."""

    family: str
    method: str
    codes: tuple[str, ...]
    rest: tuple[str, ...]


def rows() -> Iterator[Row]:
    """Of all tables of the page."""
    page = (HERE / "families.md").read_text()
    for family, text in re.findall(r"^### (.+?)$(.*?)(?=^##)", page, re.MULTILINE | re.DOTALL):
        listed = False  # inside of a table of methods
        for line in text.splitlines():
            listed = line.startswith("|") and (listed or line.startswith("| method"))
            if not listed or line.startswith(("| method", "|---")):
                continue
            cells = [
                cell.replace("\\|", "|").strip()
                for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))
            ]
            method, _, ask, *rest = cells
            codes = [
                f"attend({code!r})" if "mixers." not in code and "ra." not in code else code
                for code in re.findall(r"`([^`]+\(.*?\))`", ask)
            ]
            yield Row(family, method, tuple(codes), tuple(rest))


def inputs(n: int = N) -> dict[str, torch.Tensor]:
    """What methods need of a whole sequence, float64: with an axis of tokens at 1."""
    draw = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    at = torch.arange(n)[None, :, None, None]
    back = torch.stack([at // BLOCK - 2, at // BLOCK - 4], -1)[..., 0, :]
    return {
        "q": normal(1, n, HEADS, DIM),
        "k": normal(1, n, HEADS, DIM),
        "v": normal(1, n, HEADS, DIM),
        "logits": normal(1, n, HEADS, 1),
        "decay": -torch.rand(1, n, HEADS, generator=draw, dtype=torch.float64) / 4,
        "step": torch.rand(1, n, HEADS * DIM, generator=draw, dtype=torch.float64),
        "b_in": normal(1, n, 3),
        "c_out": normal(1, n, 3),
        "gates": torch.rand(1, n, HEADS, 3, generator=draw, dtype=torch.float64),
        "ids": torch.where(back < 0, -1, back).expand(1, n, HEADS, 2).contiguous(),
        "index_q": normal(1, n, 2, 4),
        "index_k": normal(1, n, 4),
        "index_weights": torch.rand(1, n, 2, generator=draw, dtype=torch.float64),
    }


def shared(n: int = N) -> dict[str, Any]:
    """What is alike on all ranks."""
    draw = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    return {
        "n": n,
        "documents": [n],
        "rotations": normal(2, DIM, 2),
        "centroids": normal(HEADS, 4, DIM),
        "project": normal(n, 4),
        "memory": normal(HEADS, 4, DIM),
        "spans": torch.tensor([9.5, 20.25], dtype=torch.float64),
        "projection": normal(32, DIM),
        "filters": normal(HEADS * DIM, 4),
        "rates": -torch.rand(HEADS * DIM, 3, generator=draw, dtype=torch.float64),
        "heads_decay": torch.tensor([-0.05, -0.2], dtype=torch.float64),
        "elu": lambda x: F.elu(x) + 1,
        "ra": ra,
        "mixers": mixers,
    }


def run(code: str, world: int, whole: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the code gives on so many virtual ranks, put together."""
    n = whole["q"].shape[1]
    names = shared(n)
    mask = ra.masks.causal(n)
    layout = ra.layouts.zigzag(n, world)
    blocks = ra.make_blocks(mask, layout, BLOCK)
    names |= {
        "layout": layout,
        "blocks": blocks,
        "tokens": ra.make_blocks(mask, layout, 1),
        "segments": ra.make_segments(mask, layout),
        "plan": ra.make_plan(mask, layout, "ring"),
    }

    def work(rank: Any) -> torch.Tensor:
        own = {name: layout.shard(x, rank.rank) for name, x in whole.items()}

        def planned(text: str) -> Any:
            return ra.make_plan(mask_text.parse(text, n, [n]), layout, "direct")

        def attend(text: str) -> torch.Tensor:
            return ra.ring_attention(own["q"], own["k"], own["v"], planned(text), rank)

        def part(text: str) -> mixers.Part:
            return mixers.Part(own["k"], own["v"], planned(text))

        known = names | own | {"group": rank, "attend": attend, "part": part}
        return eval(code, known)  # the page's own code

    parts = VirtualWorld(world, 60).run(work)
    for one in (layout, blocks.summaries()):
        if all(part.shape[1] == one.count(rank) for rank, part in enumerate(parts)):
            return one.unshard(parts)
    raise AssertionError(f"{code}: what comes out is of neither tokens nor blocks")


def draw() -> None:
    """A picture for each family: weights of one head, queries coloured by their rank."""
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure

    from ringattn.cli.pictures import colours

    world = 3
    layout = ra.layouts.zigzag(N, world)
    owner = np.zeros(N, int)
    for run_, rank in layout.owned:
        owner[run_.start : run_.stop] = rank
    ink = np.array([to_rgb(colour) for colour in colours(world)])[owner]  # [queries, 3]
    whole = inputs()
    whole["v"] = torch.eye(N, dtype=torch.float64)[None, :, None].expand(1, N, HEADS, N)
    for family in dict.fromkeys(row.family for row in rows()):
        shown = [
            (row.method, code)
            for row in rows()
            for code in row.codes
            # Without those of channels instead of values, and Luna, whose keys are made of values.
            if row.family == family and "flatten" not in code and "luna" not in code
        ]
        columns = min(5, len(shown))
        lines = -(-len(shown) // columns)
        figure = Figure(figsize=(2.5 * columns, 2.7 * lines), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).flatten()
        for axis in axes:
            axis.axis("off")
        for axis, (method, code) in zip(axes, shown, strict=False):
            weights = run(code, world, whole)[0, :, 0].abs().numpy()
            weights = (weights / weights.max(1, keepdims=True).clip(1e-9)) ** 0.5
            if len(weights) == N:
                picture = 1 - weights[..., None] * (1 - ink[:, None])
            else:
                picture = 1 - weights[..., None] * np.array([0.7, 0.7, 0.7])
            axis.imshow(picture, interpolation="nearest", aspect="auto")
            axis.set_title(method.split(",")[0].split(" (")[0], fontsize=8)
        name = family.lower().split("-")[0]
        figure.savefig(HERE / f"families_{name}.png", dpi=100)


if __name__ == "__main__":
    draw()
