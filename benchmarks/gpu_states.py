"""A section of gpu_suite.py: mixers with a state on the GPU, right and repeatable over two ranks'
segments beside the recurrence in float64, and how long a layer of 8,192 tokens takes."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

import ringattn as ra
from ringattn.comm import VirtualWorld
from ringattn.mixers import delta, linear, naive
from ringattn.planning.segments import Segments

Inputs = dict[str, torch.Tensor]
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


def call(mixer: Callable, x: Inputs, segments: Segments, group: Any) -> torch.Tensor:
    more = [x["beta"]] if mixer is delta else []
    return mixer(
        x["q"], x["k"], x["v"], *more, x["decay"], segments=segments, group=group, scale=1.0
    )


def error_of(mixer: Callable, decay: str, n: int, device: torch.device) -> tuple[float, bool]:
    """(the largest relative error of the output and of all gradients over two ranks, whether a
    second time gives the same bits)."""
    lengths = [n // 3, 1, n - n // 3 - 1]
    layout = ra.layouts.zigzag(n, 2)
    segments = Segments(layout, lengths)
    exact = inputs(n, 2, 16, decay, torch.device("cpu"), torch.float64)
    for x in exact.values():
        x.requires_grad_()
    beta = exact["beta"] if mixer is delta else None
    want = naive.recurrence(exact["q"], exact["k"], exact["v"], exact["decay"], beta, None, lengths)
    d_out = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).double()
    want.backward(d_out)

    def work(rank: Any) -> list[torch.Tensor]:
        own = {
            name: layout.shard(x.detach(), rank.rank).float().to(device).requires_grad_()
            for name, x in exact.items()
        }
        out = call(mixer, own, segments, rank)
        out.backward(layout.shard(d_out, rank.rank).float().to(device))
        grads = [x.grad for x in own.values() if x.grad is not None]
        return [out.detach(), *grads]

    first, second = (
        [layout.unshard([part.cpu() for part in parts]) for parts in zip(*ranks, strict=True)]
        for ranks in (VirtualWorld(2, 120).run(work) for _ in range(2))
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

        def both(mixer=mixer, x=x, segments=segments) -> None:
            call(mixer, x, segments, None).sum().backward()

        (times,) = suite.timed({name: both}).values()
        rows.append({"mixer": name, "error": error, "right": error < 1e-5, "same": same,
                     "ms": 1e3 * median(times), "tokens": n})  # fmt: skip
        print(f"{name}: off by {error:.1e}, same bits: {same}, {rows[-1]['ms']:.1f} ms", flush=True)
