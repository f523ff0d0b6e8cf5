"""Families of efficient attention side by side; draws the pictures of docs/families.md.

    python benchmarks/families.py passkey [--steps 1500] [--only NAME ...]
    python benchmarks/families.py traffic
    python benchmarks/families.py estimate
    python benchmarks/families.py planning
    python benchmarks/families.py buckets

``passkey`` trains a small model of each on finding a number in a text (two runs at a time, one
thread each) and writes results/families_passkey.json as they end; ``traffic`` counts what a choice
moves on 64 virtual ranks; ``estimate`` is `ringattn estimate` of a layer of each at 1M tokens on 64
GPUs; ``planning`` times the plan of a choice; ``buckets`` attention within buckets beside full
attention. What each attends is drawn by docs/draw_families.py.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from passkey import start

import ringattn as ra
from ringattn import mixers
from ringattn.cli.families import draw, predicted, row
from ringattn.cost.presets import load
from ringattn.execution.carriers import VirtualWorld
from ringattn.mixers.routed import chosen_part, moba_choice
from ringattn.planning.blocks import Blocks
from ringattn.planning.routing import ChoicePlan

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"


def kind(keys):
    return [f"attention.kinds={{r:{{{keys}}}}}", "attention.pattern=[r]"]


PASSKEY = {
    "full": [],
    "window of 16": ["attention.window=16"],
    "moba": kind("mixer:moba,block:16,top_k:3"),
    "nsa": kind("mixer:nsa,block:16,top_k:4,window:16"),
    "pooled": kind("mixer:pooled,block:16,near:1,how:learned"),
    "scatterbrain": kind("mixer:scatterbrain,block:16,features:64"),
    "hashed": kind("mixer:hashed,block:16,buckets:4,rounds:2"),
    "adaptive span": kind("mixer:adaptive_span,window:112,ramp:2"),
}


def passkey(options):
    """Accuracy over depth and length of a model of each family, after as many steps."""
    jobs, names = {}, [name for name in PASSKEY if not options.only or name in options.only]
    results = RESULTS / "families_passkey.json"
    known = json.loads(results.read_text()) if results.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        waiting = list(names)
        while waiting or jobs:
            while waiting and len(jobs) < 2:
                name = waiting.pop(0)
                keys = ["experiment=passkey", "engine=fsdp", "seq_len=128", "model.kv_heads=2",
                        "batch_size=16",
                        f"train.steps={options.steps}", f"eval.every={options.steps // 5}",
                        "eval.lengths=[128]", *PASSKEY[name]]  # fmt: skip
                jobs[name] = start(f"{folder}/{name}", 1, *keys), time.monotonic()
            time.sleep(1)
            for name, (job, begin) in list(jobs.items()):
                if job.poll() is None:
                    continue
                if job.returncode:
                    raise SystemExit(f"exit status {job.returncode}: {' '.join(job.args)}")
                seconds = round(time.monotonic() - begin)
                lines = Path(folder, name, "eval.jsonl").read_text().splitlines()
                known[name] = {
                    "keys": PASSKEY[name],
                    "steps": [
                        {"step": at["step"], "cells": at["probes"]} for at in map(json.loads, lines)
                    ],
                }
                results.write_text(json.dumps(known, indent=1) + "\n")
                accuracy = _accuracy(known[name]["steps"][-1]["cells"])
                print(json.dumps({"run": name, "seconds": seconds, "accuracy": accuracy}),
                      flush=True)  # fmt: skip
                del jobs[name]
    draw_passkey(known)
    print("\n| " + " | ".join(known) + " |\n|" + "---|" * len(known))
    found = [max(_accuracy(each["steps"][-1]["cells"]).items())[1] for each in known.values()]
    print("| " + " | ".join(f"{100 * x:.0f} %" for x in found) + " |")


def _accuracy(cells):
    """By length, the mean over depths."""
    lengths = sorted({cell["length"] for cell in cells})
    return {n: statistics.mean(c["accuracy"] for c in cells if c["length"] == n) for n in lengths}


def draw_passkey(known):
    """Share of keys found by depth, at the longest length."""
    names = [name for name in PASSKEY if name in known]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for place, name in enumerate(names):
        last = known[name]["steps"][-1]["cells"]
        longest = max(cell["length"] for cell in last)
        cells = sorted((c["depth"], c["accuracy"]) for c in last if c["length"] == longest)
        left.bar(place, 100 * statistics.mean(x for _, x in cells), color=f"C{place}")
        curve = [(at["step"], 100 * _accuracy(at["cells"])[longest]) for at in known[name]["steps"]]
        right.plot(*zip(*curve, strict=True), marker="o", color=f"C{place}", label=name)
    left.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
    left.set_ylabel(f"% of keys found, {longest} tokens")
    right.set_xlabel("training step")
    right.set_ylabel("%")
    figure.savefig(ROOT / "docs/families_passkey.png", dpi=110)


def traffic(options):
    """Rows that a choice brings to 64 ranks, beside a ring's and those that nobody chose."""
    n, world, size, top_k, dim = 16384, 64, 64, 4, 16
    layout = ra.layouts.contiguous(n, world)
    blocks = ra.make_blocks(ra.masks.causal(n), layout, size)
    ring = ra.make_plan(ra.masks.causal(n), layout, "ring")
    of_ring = sum(ring.recv_tokens(rank) for rank in range(world))
    print(f"{n:,} tokens, {world} ranks, blocks of {size}, top_k {top_k}, one head\n")
    print(f"| keys and queries | rows moved (the plan's) | of a ring's {of_ring:,} | rows that "
          "nobody of a rank chose |\n|---|---|---|---|")  # fmt: skip
    kinds = (("random", 0.0), ("clustered: neighbours ask alike", 4.0))
    for name, strength in kinds:
        draw = torch.Generator().manual_seed(0)
        q, k = (torch.randn(1, n, 1, dim, generator=draw) for _ in range(2))
        topic = torch.randn(1, n // 256, 1, dim, generator=draw).repeat_interleave(256, 1)
        q = q + strength * topic

        def work(rank, q=q, k=k):
            own = [layout.shard(x, rank.rank) for x in (q, k, k)]
            choice = moba_choice(*own[:2], blocks, top_k, rank)
            return chosen_part(*own, choice, blocks, rank).plan

        plan = VirtualWorld(world).run(work)[0]
        moved = sum(plan.recv_tokens(rank) for rank in range(world))
        earlier = sum(layout.count(a) for a in range(world) for b in range(world) if a < b)
        print(f"| {name} | {moved:,} | {moved / of_ring:.3f} | {1 - moved / earlier:.3f} |")


def estimate(options):
    """`ringattn estimate --families` of 8B at 1M tokens on 64 H100s; its picture and numbers."""
    keys = ["model=8b", "precision=bf16", "seq_len=1048576", "parallel.cp=64", "engine=fsdp",
            "memory=long", "parallel.schedule=direct"]  # fmt: skip
    hardware = load("h100")
    steps = predicted(keys, 64, hardware)
    rows = {name: row(step) for name, step in steps.items()}
    (RESULTS / "families_estimate.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, next(iter(steps.values())), ROOT / "docs/families_estimate.png")
    print("| family | layer ms | kernel ms | exposed ms | MB | GiB |\n|---|---|---|---|---|---|")
    for name, own in rows.items():
        print(
            f"| {name} | {own['layer_ms']:,.0f} | {own['attention_kernel_ms']:,.0f} | "
            f"{own['exposed_exchange_ms']:,.0f} | {own['received_bytes'] / 1e6:,.0f} | "
            f"{own['peak_memory_bytes'] / 2**30:.1f} |"
        )


def planning(options):
    """Seconds that a rank takes to make the plan of a choice: blocks chosen at random."""
    print(
        "| tokens | ranks | K/V heads | block | bands | median of 5: s (range) |\n"
        "|---|---|---|---|---|---|"
    )
    for n, world in ((65536, 8), (262144, 16), (1048576, 64)):
        size, copies, top_k = 512, 8, 8
        layout = ra.layouts.zigzag(n, world)
        blocks = ra.make_blocks(ra.masks.causal(n), layout, size)
        draw, counts = np.random.default_rng(0), np.zeros((world, copies, len(blocks)), np.int32)
        for rank in range(world):
            own = layout.positions(rank)[::64] // size
            for copy in range(copies):
                for _ in range(top_k - 1):
                    np.add.at(counts[rank, copy], (draw.random(len(own)) * own).astype(int), 64)
        took = []
        for _ in range(5):
            begin = time.perf_counter()
            plan = ChoicePlan(blocks, counts)
            plan.rank(world // 2)
            took.append(time.perf_counter() - begin)
        bands = sum(len(step.bands) for step in plan.steps(world // 2))
        seconds = f"{statistics.median(took):.3f} ({min(took):.3f}-{max(took):.3f})"
        print(f"| {n:,} | {world} | {copies} | {size} | {bands:,} | {seconds} |", flush=True)


def buckets(options):
    """Seconds of attention within buckets beside full attention, forward and backward, one process
    and one head's sizes; interleaved, medians of 5 and ranges."""
    torch.set_num_threads(1)
    print("| tokens | full: s | buckets | window of 256 |\n|---|---|---|---|")
    for n in (2048, 4096, 8192):
        layout = ra.layouts.contiguous(n, 1)
        blocks = Blocks(layout, [n], 128)
        plan = ra.make_plan(ra.masks.causal(n), layout)
        draw = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, n, 4, 32, generator=draw).requires_grad_() for _ in range(3))
        rotations = torch.randn(2, 32, max(1, n // 256), generator=draw)

        def full(q=q, k=k, v=v, plan=plan):
            return ra.ring_attention(q, k, v, plan)

        def hashed(q=q, k=k, v=v, blocks=blocks, rotations=rotations):
            return mixers.hashed(q, k, v, mixers.lsh(q.detach(), rotations), blocks=blocks)

        def windowed(q=q, k=k, v=v, blocks=blocks):
            part = mixers.Part(k, v, blocks.plan(blocks.window(256)))
            return mixers.union(q, [part])

        seconds = {"full": [], "buckets": [], "window of 256": []}
        for _ in range(5):
            for name, of in (("full", full), ("buckets", hashed), ("window of 256", windowed)):
                begin = time.perf_counter()
                of().sum().backward()
                seconds[name].append(time.perf_counter() - begin)
        shown = [
            f"{statistics.median(x):.3f} ({min(x):.3f}-{max(x):.3f})" for x in seconds.values()
        ]
        print(f"| {n:,} | {' | '.join(shown)} |", flush=True)


WHAT = {
    "passkey": passkey,
    "traffic": traffic,
    "estimate": estimate,
    "planning": planning,
    "buckets": buckets,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=list(WHAT))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--only", nargs="*")
    options = parser.parse_args()
    WHAT[options.what](options)


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
