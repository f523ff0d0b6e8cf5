"""ring_attention on 2 ranks x 1 thread against torch's SDPA in one process with 2 threads.

Same total work (forward + backward, causal, float32, 8 heads, head_dim 64), interleaved in one
run: every round times each contender once; medians with the smallest and largest are printed.
A ratio above 1 means that the ring is faster. FLOPs are 12 * area * heads * head_dim.

    python benchmarks/attention.py --lengths 4096 8192 --rounds 15 [--tile 128 256]
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

HEADS, DIM = 8, 64


def worker(rank, args, rendezvous):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    for n in args.lengths:
        plan = ra.make_plan(ra.masks.causal(n), ra.layouts.BUILDERS[args.layout](n, 2))
        torch.manual_seed(0)
        whole = [torch.randn(1, n, HEADS, DIM) for _ in range(4)]
        *own, dout = [plan.layout.shard(x, rank) for x in whole]
        own = [x.requires_grad_() for x in own]
        dense = [x.transpose(1, 2).contiguous().requires_grad_() for x in whole[:3]]
        dense_dout = whole[3].transpose(1, 2).contiguous()

        def ring(tile, own=own, dout=dout, plan=plan):
            aten.cut = lambda *band: pieces.cut(*band, tile)
            torch.autograd.grad(ra.ring_attention(*own, plan), own, dout)

        def sdpa(dense=dense, dense_dout=dense_dout):
            if rank == 0:
                torch.set_num_threads(2)
                out = torch.nn.functional.scaled_dot_product_attention(*dense, is_causal=True)
                torch.autograd.grad(out, dense, dense_dout)
                torch.set_num_threads(1)

        contenders = {"sdpa, 1 process x 2 threads": sdpa}
        contenders |= {f"ring, 2 x 1, tile {t}": lambda t=t: ring(t) for t in args.tile}
        times = {name: [] for name in contenders}
        for turn in range(args.rounds + 1):
            for name, call in contenders.items():
                dist.barrier()
                begin = time.perf_counter()
                call()
                # The other rank sleeps here while SDPA uses both cores.
                done = dist.barrier(async_op=True)
                done.wait()
                if turn:
                    times[name].append(time.perf_counter() - begin)
        if rank == 0:
            report(n, times)
    dist.destroy_process_group()


def report(n, times):
    base = next(iter(times.values()))
    flops = 12 * n * (n + 1) // 2 * HEADS * DIM
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(base, seconds, strict=True)]
        print(
            f"L={n:6d}  {name:28s} median {statistics.median(seconds):.3f} s "
            f"({min(seconds):.3f}-{max(seconds):.3f})  "
            f"{flops / statistics.median(seconds) / 1e9:6.1f} GFLOP/s  "
            f"{statistics.median(ratios):.2f}x SDPA ({min(ratios):.2f}-{max(ratios):.2f})",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tile", type=int, nargs="+", default=[pieces.TILE])
    parser.add_argument("--layout", choices=list(ra.layouts.BUILDERS), default="zigzag")
    print(f"torch {torch.__version__}, {os.cpu_count()} CPUs")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (parser.parse_args(), os.path.join(folder, "rendezvous")), nprocs=2)
