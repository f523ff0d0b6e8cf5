"""What gpu_suite.py holds against float64: masks, sizes, and inputs that no test on a CPU has had.

    python benchmarks/gpu_cases.py 3/8     # every eighth case from the third on; one JSON line each

A case is a name and how it differs from one causal sequence of 1,501 tokens, bf16, head_dim 128,
four heads over two (a rehearsal has less of each). gpu_suite.py runs the shares side by side, as
compiling is most of the time.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from unittest import mock

SMALL = os.environ.get("GPU_SUITE_REHEARSAL") == "1"
if SMALL:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from ringattn.kernels import call

import ringattn as ra
from ringattn.execution.carriers import VirtualWorld
from ringattn.verify import oracle

DEVICE = torch.device("cpu" if SMALL else "cuda")
N = 36 if SMALL else 1501
HALF = torch.float16 if SMALL else torch.bfloat16
HEADS = (2, 1) if SMALL else (4, 2)
RANKS = 2 if SMALL else 4
ENGINES = ("triton",) if SMALL else ("gluon", "triton")
# RMS of the error over that of the values, for standard normal inputs.
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3, torch.float32: 1e-5}
Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Case:
    name: str
    kernel: str
    mask: ra.Mask
    dims: tuple[int, int] = (128, 128)
    dtype: torch.dtype = HALF
    softcap: float = 0.0
    ranks: int = 1
    batch: int = 1
    heads: tuple[int, int] = HEADS
    l2: int | None = None
    views: str = ""  # how the inputs lie in memory

    @property
    def row(self) -> dict:
        return {
            "mask": self.name,
            "kernel": self.kernel,
            "head_dim": "/".join(map(str, self.dims)),
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def masks(n: int) -> dict[str, ra.Mask]:
    """Window of 1/16; documents from n/4 down to single tokens, halving, again and again."""
    lengths, left = [], n
    while left:
        lengths.append(max(1, min(left, n // 2 ** (2 + len(lengths) % 6))))
        left -= lengths[-1]
    return {
        "causal": ra.masks.causal(n),
        "full": ra.masks.full(n),
        "window": ra.masks.sliding_window(n, max(1, n // 16)),
        "documents": ra.masks.documents(lengths),
    }


def cases() -> list[Case]:
    causal = ra.masks.causal(N)
    more = {
        "prefix": ra.masks.prefix_lm(N, N // 3),
        "sinks": ra.masks.sliding_window(N, N // 8) | ra.masks.sinks(N, 4),
        "dilated": ra.masks.dilated(N, N // 4, 3),
        "rows without keys": causal - ra.masks.from_slices(ra.masks.full(N // 4, N).slices, N, N),
    }
    dtypes = [torch.float16] if SMALL else [torch.bfloat16, torch.float16]
    made = []
    for kernel in ENGINES:
        made += [Case(k, kernel, m, dtype=t) for k, m in masks(N).items() for t in dtypes]
        made += [Case(k, kernel, m, (64, 64)) for k, m in more.items()]
        for dims in ((64, 64), (96, 96), (192, 128), (192, 192), (256, 256), (80, 40)):
            made.append(Case("causal", kernel, causal, dims))
        for dim in (64, 128):
            made.append(Case("softcap", kernel, causal, (dim, dim), softcap=5.0))
            made.append(Case(f"{RANKS} ranks in turn", kernel, causal, (dim, dim), ranks=RANKS))
        made.append(Case("2 sequences, small L2", kernel, causal, (64, 64), batch=2, l2=1))
        made.append(Case("one K/V head", kernel, causal, heads=(2 * HEADS[0], 1)))
        made.append(Case("odd length", kernel, ra.masks.causal(N - 4)))
        for views in ("packed QKV", "misaligned base", "another stream"):
            made.append(Case(views, kernel, causal, views=views))
        if not SMALL:
            made.append(Case("2^31 elements apart", kernel, ra.masks.causal(24), views="far"))
    made += [Case("causal", "triton", causal, (d, d), torch.float32) for d in (64, 128)]
    return made


def judge(
    got: Sequence[torch.Tensor], want: Sequence[torch.Tensor], dtype: torch.dtype
) -> tuple[dict[str, float], float, bool]:
    """(RMS errors, the worst row over what it may be, the verdict) of out, dq, dk, dv against
    float64. A row, one token of one head, may be off by 16 times the limit of its own size, and by
    4 times that of the mean row: in a row of a single key large terms cancel."""
    errors, worst, limit = {}, 0.0, LIMITS[dtype]
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        off, own = (a.double() - b).norm(dim=-1), b.norm(dim=-1)
        mean = own.square().mean().sqrt()
        errors[name] = (off.square().mean().sqrt() / mean).item()
        worst = max(worst, (off / (16 * limit * own + 4 * limit * mean)).max().item())
    finite = all(error <= limit for error in errors.values())
    return errors, worst, finite and worst <= 1


def laid(x: Tensors, views: str) -> Tensors:
    """q, k, v, dout with the same values, as ``views`` says."""
    if views == "packed QKV":  # as one projection makes them: [batch, tokens, all heads * head_dim]
        whole = torch.cat([y.flatten(2) for y in x[:3]], -1)
        ends = [0, *torch.tensor([y.shape[2] * y.shape[3] for y in x[:3]]).cumsum(0).tolist()]
        parts = [whole[..., a:e] for a, e in pairwise(ends)]
        return [p.unflatten(-1, y.shape[2:]) for p, y in zip(parts, x[:3], strict=True)] + x[3:]
    if views == "misaligned base":
        return [y.new_empty(y.numel() + 1)[1:].view(y.shape).copy_(y) for y in x]
    if views == "far":
        step = 2**27
        room = [y.new_empty(y.shape[1] * step) for y in x]
        strides = [(y.shape[1] * step, step, y.shape[3], 1) for y in x]
        return [r.as_strided(y.shape, s).copy_(y) for r, s, y in zip(room, strides, x, strict=True)]
    return x


def run(case: Case) -> tuple[dict[str, float], float, bool]:
    """One verdict; the same again must give the same bits."""
    torch.manual_seed(0)
    n, (d, dv), (heads, kv_heads) = case.mask.n_q, case.dims, case.heads
    tensors = [
        torch.randn(case.batch, n, h, size, device=DEVICE).to(case.dtype)
        for h, size in ((heads, d), (kv_heads, d), (kv_heads, dv), (heads, dv))
    ]
    plan = ra.make_plan(case.mask, ra.layouts.zigzag(n, case.ranks))

    def work(rank):
        *own, dout = (plan.layout.shard(x, rank.rank).contiguous() for x in tensors)
        *own, dout = laid([*own, dout], case.views)
        own = [x.detach().requires_grad_() for x in own]
        ends = {"kernel": case.kernel, "softcap": case.softcap or None}
        out = ra.ring_attention(*own, plan, group=rank, **ends)
        return out.detach(), *torch.autograd.grad(out, own, dout)

    def all_ranks():
        # What a kernel does not write shows: the allocator hands out NaN.
        poison = [torch.full((2**22,), torch.nan, device=DEVICE) for _ in range(4)]
        del poison
        parts = VirtualWorld(case.ranks).run(work)
        return [plan.layout.unshard(x) for x in zip(*parts, strict=True)]

    with mock.patch.object(call, "L2_BYTES", case.l2 or call.L2_BYTES):
        if case.views == "another stream" and not SMALL:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                got = all_ranks()
            stream.synchronize()
        else:
            got = all_ranks()
        again = all_ranks()
    errors, worst, right = judge(got, oracle(case.mask, *tensors, case.softcap), case.dtype)
    same = all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    return errors, worst, right and same


def main() -> None:
    share, shares = map(int, sys.argv[1].split("/"))
    for case in cases()[share::shares]:
        row = case.row
        try:
            row["errors"], row["worst_row"], row["right"] = run(case)
        except Exception as error:  # a kernel that does not run is wrong, and the next one may run
            row |= {"errors": dict.fromkeys(("out", "dq", "dk", "dv"), float("inf"))}
            first = str(error).strip().splitlines()[:1]
            row |= {"worst_row": float("inf"), "right": False}
            row["error"] = f"{type(error).__name__} {first}"[:200]
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
