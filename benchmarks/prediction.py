"""Attention forward + backward, predicted and measured, over lengths, ranks, schedules and masks.

    ringattn calibrate && python benchmarks/prediction.py [--quick] [--hardware this] [--out FILE]

Real processes over gloo, one thread each; a time is that of the slowest rank from a barrier on.
Every round measures every case, as the median of up to five times, until a second is spent, so
that a slow moment of the machine hits all alike. Medians of the rounds; "noise" is (largest -
smallest) / median. Error: predicted / measured - 1. Two schedules of the same mask, length and
ranks are "told apart" if the medians differ by more than the larger of their noises; the model then
orders them alike, ties them (within 1 %), or is wrong. fp32, 4 heads, 2 K/V heads of 64, zigzag.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from torch import multiprocessing

import ringattn as ra
from ringattn import cost
from ringattn.cost.presets import load
from ringattn.execution.carriers import end_distributed
from ringattn.planning.schedules import BUILDERS

HEADS, KV_HEADS, DIM = 4, 2, 64
REPEATS, TIE = 5, 0.01


def mask_of(name, n):
    if name == "causal":
        return ra.masks.causal(n)
    if name == "window":
        return ra.masks.sliding_window(n, n // 8) | ra.masks.sinks(n, 64)
    if name == "full":
        return ra.masks.full(n)
    lengths = [n // 2, n // 4, n // 8, n // 16]
    return ra.masks.documents([*lengths, n - sum(lengths)])


def plan_of(n, world, schedule, mask, layout="zigzag"):
    mask = mask_of(mask, n)
    lay = ra.layouts.build(layout, mask, world)
    return ra.make_plan(mask, lay, schedule, node_size=2 if world % 2 == 0 else 1)


def cases(quick):
    lengths = (2048, 4096) if quick else (2048, 4096, 8192, 16384)
    ranks = (1, 2) if quick else (1, 2, 3, 4)
    masks = (
        ("causal", "window", "documents") if quick else ("causal", "window", "documents", "full")
    )
    for n, world, mask in itertools.product(lengths, ranks, masks):
        if mask == "full" and n > 8192:
            continue  # a minute each
        for schedule in ("ring",) if world == 1 else BUILDERS:
            yield n, world, schedule, mask


def worker(rank, world, some, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/s{world}", rank=rank,
                            world_size=world)  # fmt: skip
    found = []
    for n, _, schedule, mask in [some[0], *some]:  # the first one warms up
        plan = plan_of(n, world, schedule, mask)
        tokens = plan.layout.count(rank)
        gen = torch.Generator().manual_seed(rank)
        q, k, v = (
            torch.randn(1, tokens, h, DIM, generator=gen).requires_grad_()
            for h in (HEADS, KV_HEADS, KV_HEADS)
        )
        dout = torch.randn(1, tokens, HEADS, DIM, generator=gen)
        times = []
        while len(times) < REPEATS and sum(times) < 1:  # all ranks know the same times
            dist.barrier()
            begin = time.perf_counter()
            ra.ring_attention(q, k, v, plan).backward(dout)
            took = torch.tensor(time.perf_counter() - begin)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            times.append(float(took))
        found.append(statistics.median(times))
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found[1:]))
    end_distributed()


def measure(all_cases, rounds):
    times = {case: [] for case in all_cases}
    for index in range(rounds):
        for world in sorted({case[1] for case in all_cases}):
            some = [case for case in all_cases if case[1] == world]
            with tempfile.TemporaryDirectory() as folder:
                multiprocessing.spawn(worker, (world, some, folder), nprocs=world)
                found = json.loads(Path(folder, "found.json").read_text())
            for case, seconds in zip(some, found, strict=True):
                times[case].append(seconds)
        print(f"round {index + 1} of {rounds}", file=sys.stderr, flush=True)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hardware", default="this")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="small")
    parser.add_argument("--measured", type=Path, help="measurements of an earlier --out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    hardware = load(options.hardware)
    all_cases = list(cases(options.quick))
    if options.measured:
        lines = json.loads(options.measured.read_text())
        times = {tuple(line["case"]): line["seconds"] for line in lines}
    else:
        times = measure(all_cases, options.rounds)
    shape = cost.AttentionShape(HEADS, KV_HEADS, DIM, itemsize=4)
    lines = []
    for case in all_cases:
        n, world, schedule, mask = case
        line = cost.simulate(plan_of(n, world, schedule, mask), shape, hardware, "fp32")
        median = statistics.median(times[case])
        lines.append(
            {"case": case, "seconds": times[case], "measured": median, "predicted": line.seconds,
             "compute": line.compute, "exposed": line.exposed,
             "noise": (max(times[case]) - min(times[case])) / median,
             "error": line.seconds / median - 1}
        )  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(lines) + "\n")
    print(f"hardware: {hardware.source}\n")
    print("| tokens | ranks | schedule | mask | measured s | noise | predicted s | error |")
    print("|---|---|---|---|---|---|---|---|")
    for line in lines:
        n, world, schedule, mask = line["case"]
        real, noise, guess = line["measured"], line["noise"], line["predicted"]
        print(f"| {n:,} | {world} | {schedule} | {mask} | {real:.3f} | {noise:.0%} | {guess:.3f} | "
              f"{line['error']:+.0%} |")  # fmt: skip
    errors = [abs(line["error"]) for line in lines]
    noises = [line["noise"] for line in lines]
    print(f"\n{len(lines)} cases: median error {statistics.median(errors):.1%}, worst "
          f"{max(errors):.1%}; noise median {statistics.median(noises):.1%}, worst "
          f"{max(noises):.1%}")  # fmt: skip
    apart = agree = 0
    wrong = []
    for a, b in itertools.combinations(lines, 2):
        same = [a["case"][i] == b["case"][i] for i in (0, 1, 3)]
        if not all(same):
            continue
        gap = b["measured"] / a["measured"] - 1
        if abs(gap) <= max(a["noise"], b["noise"]):
            continue
        apart += 1
        guess = b["predicted"] / a["predicted"] - 1
        agree += gap * guess > 0 and abs(guess) > TIE
        if gap * guess < 0 and abs(guess) > TIE:
            wrong.append(f"{a['case']} against {b['case'][2]}: {gap:+.0%} measured, {guess:+.0%}")
    tied = apart - agree - len(wrong)
    print(f"schedules told apart: {apart}; alike {agree}, tied {tied}, wrong {len(wrong)}")
    print("\n".join(wrong))


if __name__ == "__main__":
    main()
