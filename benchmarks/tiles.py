"""The smallest piece of the `aten` kernel: causal and packed documents for several sizes of it.

    python benchmarks/tiles.py [--tokens 8192] [--tiles 32 64 128 256] [--rounds 6]

Forward + backward, 2 gloo ranks x 1 thread, float32, 8 heads of 64, interleaved; medians
(smallest-largest). "share" is the time of sixteen equal documents over that of the causal mask,
times the ratio of the areas. benchmarks/peers.py compares with other libraries.
"""

import argparse
import os
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ringattn.kernels import aten, pieces

import ringattn as ra

HEADS, DIM, DOCUMENTS = 8, 64, 16


def worker(rank, args, rendezvous):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    n = args.tokens
    masks = {"causal": ra.masks.causal(n), "documents": ra.masks.block_local(n, n // DOCUMENTS)}
    calls, times = {}, {}
    for name, mask in masks.items():
        plan = ra.make_plan(mask, ra.layouts.zigzag(n, 2))
        tokens = plan.layout.count(rank)
        own = [torch.randn(1, tokens, HEADS, DIM, requires_grad=True) for _ in range(3)]
        dout = torch.randn(1, tokens, HEADS, DIM)

        def call(plan=plan, own=own, dout=dout):
            torch.autograd.grad(ra.ring_attention(*own, plan), own, dout)

        calls[name] = call
    for turn in range(args.rounds + 1):
        for tile in args.tiles:
            aten.cut = lambda *band, tile=tile: pieces.cut(*band, tile)
            for name, call in calls.items():
                dist.barrier()
                begin = time.perf_counter()
                call()
                dist.barrier()
                if turn:
                    times.setdefault((name, tile), []).append(time.perf_counter() - begin)
    if rank == 0:
        for tile in args.tiles:
            causal, documents = (times[name, tile] for name in masks)
            middle = [statistics.median(x) for x in (causal, documents)]
            share = middle[1] / middle[0] * masks["causal"].area / masks["documents"].area
            print(
                f"tile {tile:4d}  causal {middle[0]:.3f} s ({min(causal):.3f}-{max(causal):.3f})  "
                f"documents {middle[1]:.3f} s ({min(documents):.3f}-{max(documents):.3f})  "
                f"share {share:.2f}",
                flush=True,
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--tiles", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--rounds", type=int, default=6)
    print(f"torch {torch.__version__}, {os.cpu_count()} CPUs")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (parser.parse_args(), os.path.join(folder, "rendezvous")), nprocs=2)
