"""A section of gpu_suite.py: mixers with a state on the GPU, right and repeatable over two ranks'
segments beside the recurrence in float64, and how long a layer of 8,192 tokens takes; the same in
bfloat16 over two segments of one rank with flash-linear-attention's kernels, where they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

import ringattn as ra
from ringattn.comm import VirtualWorld
from ringattn.mixers import delta, fla, linear, naive
from ringattn.mixers.recurrent import CHUNK, CHUNK_OF_VECTORS
from ringattn.planning.layouts import Layout
from ringattn.planning.runs import Run
from ringattn.planning.segments import Segments

Inputs = dict[str, torch.Tensor]
HALF = 3e-2  # of fla's kernels in bfloat16
CASES = {
    "ssd": (linear, "heads"),
    "gla": (linear, "vectors"),
    "gated delta": (delta, "heads"),
    "kimi delta": (delta, "vectors"),
}


def inputs(n: int, heads: int, dim: int, decay: str, device: torch.device, dtype: Any) -> Inputs:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, heads, dim, generator=draw) for _ in range(3))
    log = -torch.rand(1, n, heads, *([dim] if decay == "vectors" else []), generator=draw)
    made = {"q": q, "k": F.normalize(k, dim=-1), "v": v, "decay": 0.2 * log,
            "beta": torch.rand(1, n, heads, generator=draw)}  # fmt: skip
    return {name: x.to(device, dtype) for name, x in made.items()}


def call(mixer: Callable, x: Inputs, segments: Segments, group: Any, kernels: bool) -> torch.Tensor:
    """With fla's ``kernels`` where they run, or in chunks of torch."""
    decays = 4 if x["decay"].dim() == 4 else 3
    chunk = None if kernels else {3: CHUNK, 4: CHUNK_OF_VECTORS}[decays]
    more = [x["beta"]] if mixer is delta else []
    return mixer(
        x["q"], x["k"], x["v"], *more, x["decay"],
        segments=segments, group=group, scale=1.0, chunk=chunk,
    )  # fmt: skip


def error_of(
    mixer: Callable, decay: str, n: int, device: torch.device, dtype: Any = None
) -> tuple[float, bool]:
    """(the largest relative error of the output and of all gradients, whether a second time gives
    the same bits): in float32 over two ranks; in ``dtype`` with fla's kernels on one rank with two
    segments, since their tuner knows no threads."""
    lengths = [n // 3, 1, n - n // 3 - 1]
    layout = ra.layouts.zigzag(n, 2)
    if dtype:
        layout = Layout(n, ((Run(0, n // 2), Run(n // 2, n)),))
    segments = Segments(layout, lengths)
    exact = inputs(n, 2, 16, decay, torch.device("cpu"), torch.float64)
    rounded = dtype or torch.float32
    exact = {name: x.to(rounded).double().requires_grad_() for name, x in exact.items()}
    beta = exact["beta"] if mixer is delta else None
    want = naive.recurrence(exact["q"], exact["k"], exact["v"], exact["decay"], beta, None, lengths)
    d_out = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).double()
    want.backward(d_out)

    def work(rank: Any) -> list[torch.Tensor]:
        own = {
            name: layout.shard(x.detach(), rank.rank).to(device, rounded).requires_grad_()
            for name, x in exact.items()
        }
        out = call(mixer, own, segments, rank, bool(dtype))
        out.backward(layout.shard(d_out, rank.rank).to(device, rounded))
        grads = [x.grad for x in own.values() if x.grad is not None]
        return [out.detach(), *grads]

    first, second = (
        [layout.unshard([part.cpu() for part in parts]) for parts in zip(*ranks, strict=True)]
        for ranks in (VirtualWorld(layout.world, 120).run(work) for _ in range(2))
    )
    wants = [want.detach(), *(x.grad for x in exact.values() if x.grad is not None)]
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(first, wants, strict=True)]
    return max(errors), all(map(torch.equal, first, second))


def states(suite: Any) -> None:
    """Mixers: right, the same bits twice, and milliseconds of a layer."""
    n, heads, dim = (64, 1, 16) if suite.small else (8192, 16, 128)
    rows = suite.found["states"] = []
    for name, (mixer, decay) in CASES.items():
        if not suite.left(f"states: {name}"):
            continue
        error, same = error_of(mixer, decay, 60 if suite.small else 600, suite.device)
        x = inputs(n, heads, dim, decay, suite.device, suite.half)
        for each in x.values():
            each.requires_grad_()
        segments = Segments(ra.layouts.contiguous(n, 1), [n])

        def both(kernels, mixer=mixer, x=x, segments=segments) -> None:
            call(mixer, x, segments, None, kernels).sum().backward()

        contenders = {"torch": partial(both, False)}
        row = {"mixer": name, "error": error, "right": error < 1e-5, "same": same, "tokens": n}
        if suite.device.type == "cuda" and fla.installed():
            off, row["fla same"] = error_of(mixer, decay, 600, suite.device, suite.half)
            row |= {"fla error": off, "fla right": off < HALF}
            contenders["fla"] = partial(both, True)
        for kind, times in suite.timed(contenders).items():
            row["ms" if kind == "torch" else "fla ms"] = 1e3 * median(times)
        rows.append(row)
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
