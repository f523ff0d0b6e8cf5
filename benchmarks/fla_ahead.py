"""flash-linear-attention's kernels as ringattn.mixers calls them, compiled for a GPU on a machine
without one.

    PYTHONPATH=.venv/fla python benchmarks/fla_ahead.py [--arch sm_90] [--dim 128] [--all]

Every mixer, forward and backward, with a piece that begins inside of a document; bfloat16. Each
kernel with the first of the choices that its tuner has, with --all with all of them. Prints the
kernels that compiled, what they take of shared memory, and those that did not: exit status 1 where
a kernel has no choice that compiles and fits.
"""

import argparse
import json
import sys
import time
import types
from collections import defaultdict
from importlib.metadata import version

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

# Shared memory that a program may have, and the compute capability.
ARCHS = {
    "sm_80": (163 * 1024, (8, 0)),
    "sm_90": (227 * 1024, (9, 0)),
    "sm_100": (227 * 1024, (10, 0)),
}
MIXERS = [(rule, decay) for rule in ("linear", "delta") for decay in ("none", "scalar", "vector")]


class Driver:
    """What Triton and fla ask of a GPU's driver before anything is launched."""

    def __init__(self, capability, shared):
        self.target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
        facts = {"max_shared_mem": shared, "multiprocessor_count": 132, "warpSize": 32}
        self.utils = types.SimpleNamespace(get_device_properties=lambda device: facts)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


class Compiled(defaultdict):
    """{kernel: {choice: bytes of shared memory, or what was wrong}}."""

    def __init__(self, limit, every):
        super().__init__(dict)
        self.limit, self.every = limit, every

    def install(self):
        """From here on no kernel is launched, each is compiled; a tuner compiles its choices."""
        run = JITFunction.run

        def compile_only(kernel, *args, grid, warmup, **kwargs):
            found = run(kernel, *args, grid=grid, warmup=True, **kwargs)
            self[kernel.__name__].setdefault("untuned", found.metadata.shared)
            return found

        def choice(tuner, *args, config, **meta):
            known = self[tuner.base_fn.__name__]
            if any(isinstance(x, int) for x in known.values()) and not self.every:
                return [float("inf")] * 3
            kwargs = meta | config.all_kwargs()
            try:
                kernel, given = tuner.fn, dict(zip(tuner.arg_names, args, strict=False))
                while not isinstance(kernel, JITFunction):  # heuristics
                    for name, value in getattr(kernel, "values", {}).items():
                        kwargs[name] = value(given | kwargs)
                    kernel = kernel.fn
                kwargs["warmup"] = True
                known[str(config)] = shared = run(kernel, *args, **kwargs).metadata.shared
                return [float(shared > self.limit)] * 3
            except Exception as error:  # whatever a compiler raises is what is to be told
                known[str(config)] = f"{type(error).__name__}: {error}".splitlines()[0]
                return [float("inf")] * 3

        JITFunction.run = compile_only
        Autotuner._bench = choice


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=ARCHS, default="sm_90")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args()
    limit, capability = ARCHS[options.arch]
    triton.runtime.driver.set_active(Driver(capability, limit))
    torch.cuda.get_device_name = lambda *_: f"NVIDIA {options.arch}"
    torch.cuda.get_device_capability = lambda *_: capability
    torch.cuda.current_device = lambda: 0
    torch.cuda.device_count = lambda: 1
    from ringattn import mixers
    from ringattn.mixers import fla
    from ringattn.planning.layouts import Layout
    from ringattn.planning.runs import Run
    from ringattn.planning.segments import Segments

    compiled = Compiled(limit, options.all)
    compiled.install()
    fla.runs, fla.prove = lambda v, dk: True, lambda *_: None
    # Two segments on one rank: the second begins inside of a document.
    segments = Segments(Layout(256, ((Run(0, 100), Run(100, 256)),)), [180, 76])
    begin, ok = time.monotonic(), True
    for rule, decay in MIXERS:
        compiled.clear()
        x = {name: torch.zeros(1, 256, 4, options.dim, dtype=torch.bfloat16) for name in "qkv"}
        if rule == "delta":
            x["beta"] = torch.zeros(1, 256, 4, dtype=torch.bfloat16)
        if decay != "none":
            x["decay"] = torch.zeros(1, 256, 4, *[options.dim] * (decay == "vector"))
        for value in x.values():
            value.requires_grad_()
        getattr(mixers, rule)(**x, segments=segments).sum().backward()
        names = {}
        for name, choices in compiled.items():
            sizes = [size for size in choices.values() if isinstance(size, int) and size <= limit]
            ok = ok and bool(sizes)
            names[name] = f"{len(sizes)} of {len(choices)}, {min(sizes, default=0):,} B"
        print(json.dumps({"mixer": f"{rule}, {decay} decay", "kernels": names}), flush=True)
    print(json.dumps({
        "arch": options.arch, "dim": options.dim, "seconds": round(time.monotonic() - begin),
        "fla-core": version("fla-core"), "triton": version("triton"), "torch": torch.__version__,
        "all kernels compile and fit": ok,
    }))  # fmt: skip
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
