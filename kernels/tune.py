"""Finds better lines for the launch table, on the GPU at hand, when somebody asks for it.

A candidate is compiled first and dropped if it spills, needs more shared memory than there is, or
falls back to slower matrix instructions. What is left must agree with the line of the table, and
is timed against it on one causal sequence; ``ringattn kernels --tune`` writes what won.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from statistics import median

import torch
from ringattn.kernels.launch import Launch
from ringattn.kernels.report import Case, Report, example, report

Measure = Callable[[Case, Launch], tuple[float, list[torch.Tensor]]]
GAIN = 1.02  # a line must be faster than the table's by this much to take its place


def candidates(case: Case, now: Launch) -> Iterator[Launch]:
    """Lines worth a try for a case whose line is ``now``; none has been confirmed yet."""
    now = replace(now, measured="")
    if case.engine == "gluon":
        writers = (1, 2) if case.name == "backward" else (1,)
        for stages, number in product((2, 3, 4), writers):
            line = replace(now, stages=stages, writers=number)
            if line != now:
                yield line
        return
    # Three TF32 products for one of float32 take the registers of large tiles.
    sizes = ((16, 32, 64),) * 2 if case.dtype == torch.float32 else ((64, 128), (32, 64, 128))
    for m, n, warps, stages in product(*sizes, (4, 8), (1, 2, 3, 4)):
        overlaps = (False, True) if case.name == "forward" and case.arch == "sm_90" else (False,)
        specials = (False, True) if case.arch == "sm_100" and now.tma else (False,)
        for overlap, specialize in product(overlaps, specials):
            line = replace(
                now, m=m, n=n, warps=warps, stages=stages, overlap=overlap, specialize=specialize
            )
            if line != now:
                yield line


def fits(report: Report) -> bool:
    """Whether a compiled line may go into the table at all."""
    complete = set(report.matrix) == {report.wanted} or report.case.dtype == torch.float32
    sound = report.spill == 0 and report.shared <= report.shared_limit and not report.serialized
    return sound and complete


def tune(case: Case, now: Launch, measure: Measure, say: Callable[[str], None]) -> Launch:
    """The fastest line, or ``now``; ``measure`` runs one: (seconds, its outputs)."""
    base, wanted = measure(case, now)
    best, least = now, base / GAIN
    say(f"{case.name} {case.head_dim}/{case.v_dim}: {base * 1e3:.3f} ms with {now}")
    for line in candidates(case, now):
        try:
            # The line is that of the later steps too, which add.
            if not all(fits(report(replace(case, adds=adds), line)) for adds in (False, True)):
                continue
            seconds, got = measure(case, line)
        except Exception as error:  # what the compiler or the driver refuses is no line
            if "CUDA error" in str(error):  # after one, nothing that this process runs is right
                raise
            say(f"  {line}: {type(error).__name__}")
            continue
        if not all(alike(a, b) for a, b in zip(got, wanted, strict=True)):
            say(f"  {line}: WRONG")
        elif seconds < least:
            best, least = line, seconds
            say(f"  {seconds * 1e3:.3f} ms with {line}")
    return best


def alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Two outputs, as a whole and in every row, but for the rounding of half precision."""
    a, b = a.float(), b.float()
    off, own = (a - b).norm(dim=-1), b.norm(dim=-1)
    rows = off <= 5e-2 * own + 1e-3 * own.square().mean().sqrt()
    return bool(rows.all()) and bool((a - b).norm() <= 1e-2 * b.norm())


def measured(case: Case, line: Launch, turns: int = 20) -> tuple[float, list[torch.Tensor]]:
    """(median seconds of a launch on 16k tokens, by CUDA events; what the first one wrote)."""
    torch.manual_seed(0)
    call, outputs = example(case, line, "cuda", 16384, 16, 4)
    call.run()
    first = [x.clone() for x in outputs]
    times = []
    for _ in range(turns + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call.run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return median(times[3:]), first
