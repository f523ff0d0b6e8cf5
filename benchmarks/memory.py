"""Peak extra memory of attention per rank, by number of ranks at fixed length.

    python benchmarks/memory.py [--tokens 16384] [--worlds 4 8 16]

Real gloo processes; in each, torch's profiler records every allocation of one forward + backward,
and the largest running sum counts, less the results (out, dq, dk, dv), which anyone must hold.
fp32, 4 heads of 64, causal, zigzag. The slope is that of log(peak) over log(ranks): -1 means that
memory falls as 1 / ranks. "whole K/V" is the size of all keys and values.
"""

import argparse
import os
import tempfile

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.profiler import ProfilerActivity, profile

import ringattn as ra
from ringattn.planning import schedules

HEADS, DIM = 4, 64


def worker(rank, world, n, names, rendezvous, peaks):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    for at, name in enumerate(names):
        plan = ra.make_plan(
            ra.masks.causal(n), ra.layouts.zigzag(n, world), name, node_size=max(1, world // 2)
        )
        tokens = plan.layout.count(rank)
        own = [torch.randn(1, tokens, HEADS, DIM, requires_grad=True) for _ in range(3)]
        dout = torch.randn(1, tokens, HEADS, DIM)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            out = ra.ring_attention(*own, plan)
            results = [out, *torch.autograd.grad(out, own, dout)]
        events = record.profiler.kineto_results.events()
        moves = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        running = np.cumsum([size for _, size in moves])
        peaks[at, rank] = int(running.max()) - sum(x.nbytes for x in results)
        dist.barrier()
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--worlds", type=int, nargs="+", default=[4, 8, 16])
    arguments = parser.parse_args()
    n, names = arguments.tokens, list(schedules.BUILDERS)
    table = []
    for world in arguments.worlds:
        os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # the profiler warns of older memory
        peaks = torch.zeros(len(names), world, dtype=torch.int64).share_memory_()
        with tempfile.TemporaryDirectory() as folder:
            place = os.path.join(folder, "rendezvous")
            mp.spawn(worker, (world, n, names, place, peaks), nprocs=world)
        table.append(peaks.max(1).values.numpy() / 2**20)
    whole = 2 * n * HEADS * DIM * 4 / 2**20
    print(f"L = {n}, whole K/V {whole:.0f} MiB, largest rank, MiB\n")
    print("| schedule | " + " | ".join(f"{w} ranks" for w in arguments.worlds) + " | slope |")
    print("|---" * (len(arguments.worlds) + 2) + "|")
    for at, name in enumerate(names):
        values = [row[at] for row in table]
        slope = np.polyfit(np.log(arguments.worlds), np.log(values), 1)[0]
        print(f"| {name} | " + " | ".join(f"{x:.1f}" for x in values) + f" | {slope:.2f} |")


if __name__ == "__main__":
    main()
