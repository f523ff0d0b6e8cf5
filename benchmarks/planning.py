"""Milliseconds to plan the steps of one rank, and to list the tiles that the Triton kernels visit
in its forward, for masks, layouts, schedules and numbers of ranks.

    python benchmarks/planning.py [--repeat 5]

One process; plans and lists are pure Python and NumPy. Every plan is fresh: mask, layout and plan
caches are emptied before it is timed. Then what a training run plans at its start, and seconds of
`ringattn estimate --search` for whole runs. Medians (smallest-largest).
"""

import argparse
import statistics
import subprocess
import sys
import time

from ringattn.kernels.work import work

import ringattn as ra
from ringattn import make
from ringattn.cost.presets import load
from ringattn.planning.layer_plans import LayerPlans
from ringattn.strategy import Strategy
from ringattn.training import config
from ringattn.training.forecast import Forecast


def timed(work, repeat):
    times = []
    for _ in range(repeat):
        make.forget()
        begin = time.perf_counter()
        result = work()
        times.append(1e3 * (time.perf_counter() - begin))
    return f"{statistics.median(times):.1f} ms ({min(times):.1f}-{max(times):.1f})", result


def whole_runs(repeat):
    """Seconds of the whole command, start of Python included."""
    print("\n| command | seconds |\n|---|---|")
    for keys in (
        ["seq_len=1M", "ranks=64"],
        ["seq_len=1M", "ranks=1024"],
        ["seq_len=16M", "ranks=1024"],
        ["seq_len=16M", "ranks=1024", "attention.mask=sliding_window(4096)"],
    ):
        model = ["model=8b", "model.vocab_size=128256", "precision=bf16"]
        command = ["estimate", *model, *keys, "--search", "--json"]
        times = []
        for _ in range(repeat):
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-m", "ringattn", *command], check=True,
                           stdout=subprocess.DEVNULL)  # fmt: skip
            times.append(time.perf_counter() - begin)
        middle = f"{statistics.median(times):.2f} ({min(times):.2f}-{max(times):.2f})"
        print(f"| estimate --search model=8b {' '.join(keys)} | {middle} |", flush=True)


def starts(repeat):
    """What every rank plans before the first step, and rank 0 besides."""
    n = 2**20
    print("\n| ranks | schedule | layout | a rank's plan | self-check | rank 0: forecast |")
    print("|---|---|---|---|---|---|")
    hardware = load("h100")
    for cp in (256, 1024):
        for schedule, layout in (
            ("ring", "zigzag"), ("double_ring", "zigzag"), ("all_gather", "zigzag"),
            ("direct", "balanced"),
        ):  # fmt: skip
            split = Strategy(cp, layout, schedule, node_size=8)
            rank, m = cp // 3, 4 * cp
            alone = ra.masks.sliding_window(m, 1)
            keys = [f"seq_len={n}", "precision=bf16", f"parallel.cp={cp}", "parallel.node_size=8",
                    f"parallel.schedule={schedule}", f"parallel.layout={layout}"]  # fmt: skip
            run = config.resolved(config.load(["data.root=null", *keys]), cp)

            def own(split=split, rank=rank, run=run):
                plan = split.plan(run.attention.build([n], n))
                plan.steps(rank)
                return plan

            def check(split=split, rank=rank, m=m, alone=alone):
                for mask in (alone | ra.masks.sinks(m, 1), alone):
                    split.plan(mask).steps(rank)

            mine, _ = timed(own, repeat)
            checks, _ = timed(check, repeat)

            def ahead(run=run, cp=cp, own=own):
                plans = LayerPlans.alike(own(), run.model.layers)
                forecast = Forecast(run, cp, plans, hardware)
                begin = time.perf_counter()
                _ = forecast.received, forecast.memory, forecast.step.seconds
                return time.perf_counter() - begin

            seconds = [1e3 * timed(ahead, 1)[1] for _ in range(repeat)]
            first = f"{statistics.median(seconds):.1f} ms ({min(seconds):.1f}-{max(seconds):.1f})"
            print(f"| {cp} | {schedule} | {layout} | {mine} | {checks} | {first} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    draws = [
        ("1,000 documents", 2**20, 64, [2**20 // 1000] * 999 + [2**20 - 999 * (2**20 // 1000)]),
        ("70 documents", 2**20, 1024, [15_000] * 69 + [2**20 - 69 * 15_000]),
        ("causal", 2**20, 64, [2**20]),
        ("causal", 2**24, 1024, [2**24]),
    ]
    print(
        "| tokens | ranks | mask | layout | the layout itself | ring | its work lists | direct "
        "| its work lists |"
    )
    print("|---" * 9 + "|")
    for name, n, world, lengths in draws:
        for layout_name in ra.layouts.NAMES:
            made, layout = timed(
                lambda layout_name=layout_name, lengths=lengths, world=world: ra.layouts.build(
                    layout_name, ra.masks.documents(lengths), world
                ),
                repeat,
            )
            cells = [f"{n:,}", f"{world:,}", name, layout_name, made]
            for schedule in ("ring", "direct"):
                mask = ra.masks.documents(lengths)

                def plan_one(mask=mask, layout=layout, schedule=schedule, world=world):
                    return ra.make_plan(mask, layout, schedule).steps(world // 2)

                took, steps = timed(plan_one, repeat)

                rows = layout.count(world // 2)

                def list_all(steps=steps, rows=rows):
                    for step in steps:
                        if step.bands:
                            work(step.bands, rows, 128, 64, False, False)

                listed, _ = timed(list_all, repeat)
                cells += [took, listed]
            print(f"| {' | '.join(cells)} |", flush=True)
    starts(repeat)
    whole_runs(repeat)


if __name__ == "__main__":
    main()
