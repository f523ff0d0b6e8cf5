"""Schedules over a slow link: two nodes of two ranks, predicted from a calibration across both.

    python benchmarks/slow_links.py [--speeds 100 1000 10000] [--rounds 5] [--keep FOLDER]
                                    [--out FILE]

Two network namespaces, each with one core of this machine and two ranks on it, joined by a link
that `tc tbf` limits to so many Mbit/s each way (root and two cores are needed). At every speed
`ringattn calibrate` runs under torchrun on both nodes, sees none of what follows, and is what
predictions and schedule=auto go by. Then attention forward + backward, fp32, 8 heads of 64 with
4 K/V heads, 4,096 tokens, zigzag: a time is that of the slowest rank from a barrier on; every round
measures every case once, in another order. Medians of the rounds; "noise" is the half-width of
their middle half over the median. Error: predicted / measured - 1. "auto": what schedule=auto
takes, and its measured time over the fastest schedule's. --keep: descriptions to be written to, or
read from where they are there.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist

import ringattn as ra
from ringattn import cost
from ringattn.cost.presets import load
from ringattn.execution.carriers import end_distributed
from ringattn.planning.schedules import BUILDERS

ROOT = Path(__file__).resolve().parent.parent
N, RANKS, HEADS, KV_HEADS, DIM = 4096, 2, 8, 4, 64
MASKS = {"causal": ra.masks.causal(N), "window": ra.masks.sliding_window(N, N // 8)}
CASES = list(itertools.product(BUILDERS, MASKS))


def plan_of(schedule, mask, **more):
    layout = ra.layouts.zigzag(N, 2 * RANKS)
    return ra.make_plan(MASKS[mask], layout, schedule, node_size=RANKS, **more)


def worker(rounds, out):
    """On every rank; the first one writes [{schedule, mask: seconds}] of the rounds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, draw = dist.get_rank(), random.Random(0)
    gen = torch.Generator().manual_seed(rank)
    tokens = plan_of("ring", "causal").layout.count(rank)
    q, k, v = (
        torch.randn(1, tokens, h, DIM, generator=gen).requires_grad_()
        for h in (HEADS, KV_HEADS, KV_HEADS)
    )
    dout = torch.randn(1, tokens, HEADS, DIM, generator=gen)
    found = []
    for _ in range(rounds + 1):  # the first one warms up
        times = {}
        for case in draw.sample(CASES, len(CASES)):
            plan = plan_of(*case)
            dist.barrier()
            begin = time.perf_counter()
            ra.ring_attention(q, k, v, plan).backward(dout)
            took = torch.tensor(time.perf_counter() - begin)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            times[",".join(case)] = float(took)
        found.append(times)
    if rank == 0:
        Path(out).write_text(json.dumps(found[1:]))
    end_distributed()


def launch(nodes, script, *arguments):
    from tests.nodes import finish

    for status, text in finish(nodes.torchrun(script, *arguments, ranks=RANKS, pinned=True)):
        if status:
            raise RuntimeError(f"{script} failed:\n{text[-3000:]}")


def lines_of(speed, hardware, rounds):
    shape = cost.AttentionShape(HEADS, KV_HEADS, DIM, itemsize=4)
    for case in CASES:
        times = [times[",".join(case)] for times in rounds]
        line = cost.simulate(plan_of(*case), shape, hardware, "fp32")
        low, median, high = statistics.quantiles(times, n=4)
        yield {
            "mbit_s": speed, "schedule": case[0], "mask": case[1], "seconds": times,
            "measured": median, "noise": (high - low) / 2 / median, "predicted": line.seconds,
            "error": line.seconds / median - 1,
        }  # fmt: skip


def auto(mask, hardware):
    """The schedule that "auto" takes."""
    shape = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "itemsize": 4}
    return plan_of("auto", mask, ulysses=1, hardware=hardware, **shape).schedule


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--speeds", type=int, nargs="+", default=[100, 1000, 10000])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from tests.nodes import Nodes

    lines = []
    with TemporaryDirectory() as folder:
        keep = options.keep or Path(folder)
        keep.mkdir(parents=True, exist_ok=True)
        for speed in options.speeds:
            path = keep / f"{speed}.yaml"
            with Nodes() as nodes:
                nodes.limit(speed)
                begin = time.monotonic()
                if not path.exists():
                    launch(nodes, "ringattn", "calibrate", f"out={path}")
                between = time.monotonic()
                found = Path(folder) / "found.json"
                launch(nodes, Path(__file__).resolve(), "worker", str(options.rounds), str(found))
                end = time.monotonic()
            hardware = load(str(path))
            lines += lines_of(speed, hardware, json.loads(found.read_text()))
            print(f"{speed} Mbit/s: calibrated in {between - begin:.0f} s, measured in "
                  f"{end - between:.0f} s", file=sys.stderr, flush=True)  # fmt: skip
            for line in lines:
                if line["mbit_s"] == speed:
                    line["auto"] = auto(line["mask"], hardware)
    if options.out:
        options.out.write_text(json.dumps(lines) + "\n")
    names = list(dict.fromkeys(line["schedule"] for line in lines))
    shown = [name.replace("_", " ") for name in names]
    print(
        f"| Mbit/s | mask | {' | '.join(shown)} | `auto` takes |\n"
        + "|---" * (len(names) + 3)
        + "|"
    )
    for speed, mask in itertools.product(options.speeds, MASKS):
        some = {x["schedule"]: x for x in lines if (x["mbit_s"], x["mask"]) == (speed, mask)}
        each = [f"{some[x]['measured']:.2f} ({some[x]['predicted']:.2f})" for x in names]
        chosen, least = some[names[0]]["auto"], min(x["measured"] for x in some.values())
        over = some[chosen]["measured"] / least - 1
        how = f"+{100 * over:.1f} %" if over else "the fastest"
        print(f"| {speed:,} | {mask} | {' | '.join(each)} | {chosen.replace('_', ' ')}, {how} |")
    errors = [abs(line["error"]) for line in lines]
    print(f"\n{len(lines)} cases: median error {statistics.median(errors):.1%}, worst "
          f"{max(errors):.1%}; noise median "
          f"{statistics.median(line['noise'] for line in lines):.1%}")  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(int(sys.argv[2]), sys.argv[3])
    else:
        sys.path.insert(0, str(ROOT))
        main()
