"""Linear head and cross-entropy: all logits at once, torch's linear_cross_entropy, and ours.

    python benchmarks/loss.py [--tokens 2048] [--dim 512] [--vocab 32768] [--rounds 5]

Forward and backward on this machine's CPU, methods interleaved, medians and ranges. Memory is the
largest running sum of torch's allocations beyond inputs and results, from torch's profiler. Errors
are against float64: of the summed loss, and of the weight's gradient in the Frobenius norm.
"""

import argparse
import os
import statistics
import time

import numpy as np
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from ringattn.models.loss import chunked_cross_entropy


def full(hidden, weight, labels):
    return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")


def ours(hidden, weight, labels):
    return chunked_cross_entropy(hidden, weight, labels)[0]


def torchs(hidden, weight, labels):
    return F.linear_cross_entropy(hidden, weight, labels, reduction="sum")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    methods = {"all logits": full, "chunked (ours)": ours}
    if hasattr(F, "linear_cross_entropy"):
        methods["torch linear_cross_entropy"] = torchs
    draw = torch.Generator().manual_seed(0)
    exact = torch.randn(options.tokens, options.dim, generator=draw, dtype=torch.float64)
    head = torch.randn(options.vocab, options.dim, generator=draw, dtype=torch.float64) * 0.02
    labels = torch.randint(options.vocab, (options.tokens,), generator=draw)
    print(f"{options.tokens} tokens, dim {options.dim}, vocabulary {options.vocab}, "
          f"{torch.get_num_threads()} threads, medians of {options.rounds}")  # fmt: skip
    print("| dtype | method | seconds (range) | extra MiB | loss error | dW error |")
    print("|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        x, w = exact.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()
        x64, w64 = (t.detach().double().requires_grad_() for t in (x, w))
        want = F.cross_entropy(x64 @ w64.T, labels, reduction="sum")
        (want_dw,) = torch.autograd.grad(want, w64)
        times = {name: [] for name in methods}
        rows = {}
        for turn in range(options.rounds + 1):
            for name, method in methods.items():
                begin = time.perf_counter()
                loss = method(x, w, labels)
                _, dw = torch.autograd.grad(loss, (x, w))
                if turn:
                    times[name].append(time.perf_counter() - begin)
                    continue
                off = abs(float(loss) - float(want)) / float(want)
                off_dw = float((dw.double() - want_dw).norm() / want_dw.norm())
                rows[name] = memory(method, x, w, labels), off, off_dw
        for name in methods:
            each = times[name]
            extra, off, off_dw = rows[name]
            print(f"| {str(dtype).split('.')[1]} | {name} | {statistics.median(each):.2f} "
                  f"({min(each):.2f}-{max(each):.2f}) | {extra / 2**20:.0f} | {off:.1e} | "
                  f"{off_dw:.1e} |", flush=True)  # fmt: skip


def memory(method, x, w, labels):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        grads = torch.autograd.grad(method(x, w, labels), (x, w))
    events = record.profiler.kineto_results.events()
    moves = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return np.cumsum([size for _, size in moves]).max() - sum(g.nbytes for g in grads)


if __name__ == "__main__":
    main()
