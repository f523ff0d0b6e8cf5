"""The host's share of a call: Python from ring_attention to the launch, with nothing to compute.

    python benchmarks/host.py            # about half a minute, on any CPU

Kernels are stubbed where Triton is asked to launch one, exchanges where a carrier is asked to
start one; all else is what a call does on a Hopper GPU, on tensors of 16 tokens in the memory of
the host.
Microseconds of one process: medians, with the quartiles, of calls in turns, a plan of one step
beside rings of 2 and of 8 ranks. "Each further step" is the difference between the rings over the
six steps between them.
"""

from __future__ import annotations

import gc
import time
from statistics import quantiles

import torch
from ringattn.kernels import NAMES, triton
from triton.runtime.jit import JITFunction

import ringattn as ra

TOKENS, HEADS, HEAD_DIM, TURNS = 16, 2, 64, 400
WORLDS = (1, 2, 8)


class Launched:
    """A kernel that is compiled, and launches nothing."""

    def __getitem__(self, grid):
        return lambda *arguments: None


class Silent:
    """A carrier whose exchanges are over at once."""

    rank = 0

    def __init__(self, world: int) -> None:
        self.world = world

    def start(self, sends, recvs, label):
        return self

    def wait(self) -> None:
        pass


def compile_only(kernel, *arguments, **options) -> Launched:
    return Launched()


def stub() -> None:
    """The tensors lie on the host, and are said to lie on a Hopper GPU."""
    JITFunction.run = compile_only
    gpu, modules = torch.device("cuda", 0), [triton]
    if "gluon" in NAMES:
        from ringattn.kernels import gluon

        modules.append(gluon)
        gluon.check.disagreement = lambda *given: None
    for module in modules:
        refusal, architecture = module.refusal, triton.architecture
        if hasattr(module, "capability"):
            module.capability = lambda device: (9, 0)
        module.architecture = lambda device, ask=architecture: ask(gpu)
        module.refusal = lambda dtype, device, *dims, ask=refusal: ask(dtype, gpu, *dims)
    torch.cuda.get_device_capability = lambda device: (9, 0)


def calls(kernel: str, world: int) -> tuple:
    """(forward, backward) of rank 0 of a causal ring."""
    n = TOKENS * world
    plan = ra.make_plan(ra.masks.causal(n), ra.layouts.zigzag(n, world))
    group = Silent(world)
    leaves = [torch.randn(1, TOKENS, HEADS, HEAD_DIM).bfloat16().requires_grad_() for _ in range(3)]

    def forward() -> torch.Tensor:
        return ra.ring_attention(*leaves, plan, group=group, kernel=kernel)

    out = forward()
    dout = torch.ones_like(out)

    def backward() -> object:
        return torch.autograd.grad(out, leaves, dout, retain_graph=True)

    return forward, backward


def main() -> None:
    torch.set_num_threads(1)
    stub()
    print("| kernel | pass | one step | each further step |\n| --- | --- | --- | --- |")
    for kernel in [name for name in ("gluon", "triton") if name in NAMES]:
        both = {world: calls(kernel, world) for world in WORLDS}
        for index, which in enumerate(("forward", "backward")):
            times: dict[int, list[float]] = {world: [] for world in WORLDS}
            gc.collect()
            gc.disable()  # of whole layers, not of one call
            for turn in range(TURNS + 20):
                for world in WORLDS:
                    call = both[world][index]
                    begun = time.perf_counter()
                    call()
                    took = time.perf_counter() - begun
                    if turn >= 20:
                        times[world].append(1e6 * took)
            gc.enable()
            one, two, eight = (quantiles(times[world]) for world in WORLDS)
            further = [(b - a) / 6 for a, b in zip(two, eight, strict=True)]
            print(
                f"| {kernel} | {which} | {one[1]:.0f} ({one[0]:.0f}-{one[2]:.0f}) "
                f"| {further[1]:.0f} ({further[0]:.0f}-{further[2]:.0f}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
