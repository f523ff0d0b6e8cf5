"""A layer with a state along the sequence: two ranks with a thread each beside one process with two
threads, on this machine's CPU, the same work.

    python benchmarks/mixers.py [--tokens 4096] [--dim 512] [--rounds 7]

The layer is that of a hybrid: projections, a short convolution of four tokens, the mixer (8 heads
of 64), an output projection, and a feed-forward of three times the width. Forward and backward,
float32, zigzag, the processes kept and asked in turn: medians and ranges. "bytes": what a rank
receives of summaries and halos, forward and backward, which does not grow with the length.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
from torch import nn

import ringattn as ra
from ringattn.execution.carriers import Counted, connect
from ringattn.mixers import conv, delta, linear
from ringattn.planning.segments import Segments

HEADS, WIDTH = 8, 64


class Layer(nn.Module):
    def __init__(self, dim, mixer):
        super().__init__()
        self.mixer, inner = mixer, HEADS * WIDTH
        self.qkv = nn.Linear(dim, 3 * inner, bias=False)
        self.gates = nn.Linear(dim, 2 * HEADS, bias=False)
        self.kernel = nn.Parameter(torch.randn(3 * inner, 4) / 2)
        self.out = nn.Linear(inner, dim, bias=False)
        self.up = nn.Linear(dim, 6 * dim, bias=False)
        self.down = nn.Linear(3 * dim, dim, bias=False)

    def forward(self, x, **where):
        mixed = nn.functional.silu(conv(self.qkv(x), self.kernel, **where))
        q, k, v = mixed.unflatten(-1, (3, HEADS, WIDTH)).unbind(2)
        strength, decay = self.gates(x).unflatten(-1, (2, HEADS)).unbind(2)
        decay = nn.functional.logsigmoid(decay + 4)
        if self.mixer == "ssd":
            mixed = linear(q, k, v * strength.sigmoid()[..., None], decay, **where)
        else:
            k = nn.functional.normalize(k, dim=-1)
            mixed = delta(q, k, v, strength.sigmoid(), decay, **where)
        x = x + self.out(mixed.flatten(2))
        gate, up = self.up(x).chunk(2, -1)
        return x + self.down(nn.functional.silu(gate) * up)


def serve(pipe, rank, world, threads, folder, options):
    """One process: on every request a forward and a backward of its part."""
    torch.set_num_threads(threads)
    if world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
        )
    layout = ra.layouts.zigzag(options.tokens, world)
    segments = Segments(layout, [options.tokens])
    torch.manual_seed(0)
    layers = {mixer: Layer(options.dim, mixer) for mixer in ("ssd", "gated delta")}
    x = layout.shard(torch.randn(1, options.tokens, options.dim), rank)
    while (mixer := pipe.recv()) is not None:
        group = Counted(connect(None))
        own = x.clone().requires_grad_()
        if world > 1:
            dist.barrier()
        begin = time.perf_counter()
        layers[mixer](own, segments=segments, group=group).square().sum().backward()
        pipe.send((time.perf_counter() - begin, group.received))
    if world > 1:
        dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        teams = {}
        for name, world, threads in (("1 x 2 threads", 1, 2), ("2 x 1 thread", 2, 1)):
            teams[name] = []
            for rank in range(world):
                here, there = spawn.Pipe()
                process = spawn.Process(
                    target=serve, args=(there, rank, world, threads, folder, options), daemon=True
                )
                process.start()
                teams[name].append((here, process))
        print(f"{options.tokens} tokens, dim {options.dim}, medians of {options.rounds}")
        print("| mixer | 1 process, 2 threads: s (range) | 2 ranks, 1 thread: s (range) | "
              "speed | bytes |")  # fmt: skip
        print("|---|---|---|---|---|")
        for mixer in ("ssd", "gated delta"):
            times = {name: [] for name in teams}
            for number in range(options.rounds + 1):
                for name, team in teams.items():
                    for pipe, _ in team:
                        pipe.send(mixer)
                    answers = [pipe.recv() for pipe, _ in team]
                    if number:  # the first warms up
                        times[name].append(max(seconds for seconds, _ in answers))
                    moved = max(count for _, count in answers)
            one, two = times.values()
            cells = [f"{statistics.median(t):.3f} ({min(t):.3f}-{max(t):.3f})" for t in (one, two)]
            ratio = statistics.median(one) / statistics.median(two)
            print(f"| {mixer} | {cells[0]} | {cells[1]} | {ratio:.2f} x | {moved:,} |")
        for team in teams.values():
            for pipe, process in team:
                pipe.send(None)
                process.join(60)


if __name__ == "__main__":
    main()
