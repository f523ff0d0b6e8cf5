"""What this machine can do, measured by all of its ranks at once, in the terms of
:class:`ringattn.cost.Hardware`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import multiprocessing

from ringattn import cost, kernels
from ringattn.cost import Hardware
from ringattn.cost.hardware import Curve
from ringattn.cost.model import EngineCost, Setup, operators
from ringattn.cost.step import predict
from ringattn.cost.timeline import block_size
from ringattn.execution.attention import ring_attention
from ringattn.execution.carriers import end_distributed
from ringattn.make import make_plan
from ringattn.measure_links import STEADY, Links, large, median_seconds, unlaunched
from ringattn.models.memory import Memory
from ringattn.models.sizes import ModelConfig
from ringattn.planning import layouts, masks
from ringattn.planning.runs import Run
from ringattn.planning.slices import Band, Bands

_BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)
_SIDES = (32, 64, 128, 256, 512, 1024, 2048)
_CROWDS = (2048, 4096, 8192)  # tokens of the rings that share cores
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Heads = tuple[int, int, int]  # heads, kv_heads, head_dim


def machine(
    ranks: int,
    device: str,
    shape: Heads,
    precisions: list[str],
    engine: EngineCost,
    say: Callable[[str], None],
    links: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The description as plain data. ``shape``: heads, kv_heads and head_dim of the attention
    that is timed; ``engine``: what train.py has by default; ``links``: what is known of them
    already. Nothing else should run meanwhile."""
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    os.environ["OMP_NUM_THREADS"] = threads
    say(f"{ranks} ranks measure together on {device}, {threads} threads each")

    def spawned(precisions: list[str], only_peak: bool) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "result.pt"
            arguments = (ranks, device, shape, precisions, only_peak, folder, out)
            multiprocessing.spawn(_rank, arguments, nprocs=ranks)
            return torch.load(out, weights_only=True)

    description = spawned(precisions, False) | (links or {}) | {"inter_node": None}
    if device == "cpu":
        description |= _training(description, ranks, precisions[0], engine, say)
        say("and now more ranks than cores, which take turns")
        description |= _crowded(description, shape, precisions[0])
    before = description["peak"][precisions[0]]
    after = spawned(precisions[:1], True)["peak"][precisions[0]]
    if abs(after / before - 1) > STEADY:
        say(
            f"this machine was not steady: {before / 1e9:,.0f} GFLOP/s at the start, "
            f"{after / 1e9:,.0f} at the end; measure again when it is idle"
        )
    return description | (links or {})


def _crowded(description: dict[str, Any], shape: Heads, precision: str) -> dict[str, float]:
    """What ranks lose that share cores: causal rings of twice as many ranks as cores beside what
    the rest of the description predicts. Least squares, relative to the measured times."""
    hardware = Hardware.read(description | {"name": "", "source": ""})
    ranks = 2 * description["cores"]
    plans = [make_plan(masks.causal(n), layouts.zigzag(n, ranks), "ring") for n in _CROWDS]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.pt"
        multiprocessing.spawn(_ring, (ranks, shape, precision, folder, out), nprocs=ranks)
        measured = np.array(torch.load(out, weights_only=True))
    size = cost.AttentionShape(*shape, itemsize=DTYPES[precision].itemsize)

    def seconds(**changed: float) -> np.ndarray:
        machine = replace(hardware, **changed)
        return np.array([cost.simulate(p, size, machine, precision).seconds for p in plans])

    base = seconds()
    slopes = np.stack([seconds(oversubscription=0.1) - base, seconds(switch=0.001) - base], 1)
    weighed = slopes / measured[:, None]
    share, switch = np.linalg.lstsq(weighed, (measured - base) / measured, rcond=None)[0]
    return {"oversubscription": max(0.0, 0.1 * share), "switch": max(0.0, 0.001 * switch)}


def _ring(rank: int, ranks: int, shape: Heads, precision: str, folder: str, out: Path) -> None:
    """Median seconds of the slowest rank, of a forward and a backward at every length."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    heads, kv_heads, dim = shape
    medians = []
    for n in (_CROWDS[0], *_CROWDS):  # the first one warms up
        plan = make_plan(masks.causal(n), layouts.zigzag(n, ranks), "ring")
        tokens, times = plan.layout.count(rank), []
        q, k, v = (
            torch.randn(1, tokens, h, dim, dtype=DTYPES[precision]).requires_grad_()
            for h in (heads, kv_heads, kv_heads)
        )
        for _ in range(5):
            dist.barrier()
            begin = time.perf_counter()
            ring_attention(q, k, v, plan).sum().backward()
            took = torch.tensor(time.perf_counter() - begin)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            times.append(float(took))
        medians.append(statistics.median(times))
    if rank == 0:
        torch.save(medians[1:], out)
    end_distributed()


def _rank(
    rank: int,
    ranks: int,
    device: str,
    shape: Heads,
    precisions: list[str],
    only_peak: bool,
    folder: str,
    out: Path,
) -> None:
    place = torch.device(device, rank) if device == "cuda" else torch.device(device)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    eager = {"device_id": place} if device == "cuda" else {}
    backend = "nccl" if device == "cuda" else "gloo"
    store = f"file://{folder}/store"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=ranks, **eager)
    bench = _Bench(place, shape, precisions)
    result = {"peak": bench.peaks()} if only_peak else bench.run()
    if rank == 0:
        torch.save(result, out)
    end_distributed()


class _Bench:
    def __init__(self, device: torch.device, shape: Heads, precisions: list[str]) -> None:
        self.device, self.shape, self.precisions = device, shape, precisions
        self.dtype = DTYPES[precisions[0]]

    def run(self) -> dict[str, Any]:
        peaks = self.peaks()
        self.peak = peaks[self.precisions[0]]
        forward, backward = self._attention()
        links = Links(self.device, dist.group.WORLD)
        link = links.exchange()
        cpu = self.device.type == "cpu"
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        here = memory if cpu else torch.cuda.get_device_properties(self.device).total_memory
        bandwidth = self._bandwidth()
        return {
            "node_size": dist.get_world_size(),
            "cores": len(os.sched_getaffinity(0)) if cpu else None,
            "peak": peaks,
            "forward": forward,
            "backward": backward,
            "matmul": self._matmul(),
            "memory": float(here),
            "memory_bandwidth": bandwidth,
            "intra_node": link,
            "inter_node": None,  # nothing has been seen of another machine
            "collective": links.collective(large(link)),
            "host": {"bandwidth": self._host(), "latency": 1e-5},
            "host_memory": float(memory / (1 if cpu else dist.get_world_size())),
            "overlap_efficiency": links.overlap_efficiency(),
            "dispatch": 0.0,  # a GPU is fed ahead
            "step": 0.02,
            "framework": 2.5e9,
        }

    def peaks(self) -> dict[str, float]:
        return {name: self._peak(DTYPES[name]) for name in self.precisions}

    def _time(self, work: Callable[[], Any]) -> float:
        return median_seconds(work, self.device)

    def _random(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype or self.dtype)

    def _peak(self, dtype: torch.dtype) -> float:
        size = 8192 if self.device.type == "cuda" else 1024
        a = self._random(size, size, dtype=dtype)
        return 2 * size**3 / self._time(lambda: a @ a)

    def _matmul(self) -> dict[int, float]:
        """Share of the peak by the shortest side: many tokens times a square weight."""
        efficiency = {}
        for side in _SIDES if self.device.type == "cpu" else (*_SIDES, 4096, 8192):
            x, w = self._random(max(4096, side), side), self._random(side, side)
            efficiency[side] = (
                2 * x.numel() * side / self._time(lambda x=x, w=w: x @ w.T) / self.peak
            )
        return efficiency

    def _attention(self) -> tuple[dict[str, Any], dict[str, Any]]:
        curves: list[dict[str, Any]] = [{"efficiency": {}, "edge": {}, "band": {}} for _ in "fb"]
        heads, _, dim = self.shape
        # Time is linear in head_dim; what is left at 0 is softmax.
        wide, narrow = (np.array(self._kernel(1024, -1024, 1024, d)[1]) for d in (dim, dim // 2))
        softmax = np.clip(2 * (2 * narrow - wide) / (wide - narrow) * (dim / 2), 0, 8 * dim)
        for curve, more in zip(curves, softmax.tolist(), strict=True):
            curve["softmax"] = more
        pairs_of = [2 * heads * (2 * dim + curve["softmax"]) for curve in curves]
        for n in _BLOCKS:
            _, seconds = self._kernel(n, -n, n)
            for curve, took, factor, pair in zip(curves, seconds, (1, 2.5), pairs_of, strict=True):
                curve["efficiency"][n] = pair * factor * n * n / took / self.peak

        def excess(area: int, seconds: list[float], name: str, size: int, rows: int) -> None:
            """The time beyond that of a full block of as many pairs, in pairs per row."""
            for curve, took, factor, pair in zip(curves, seconds, (1, 2.5), pairs_of, strict=True):
                rate = self.peak * float(Curve.of(curve["efficiency"])(block_size(area, size)))
                curve[name][size] = max(0.0, (took * rate / pair / factor - area) / rows)

        for n in _BLOCKS:
            excess(*self._kernel(n, -n, 0), "edge", n, n)
        for width in _BLOCKS[:-2]:
            rows = max(2 * width, 1024)
            excess(*self._kernel(rows, 1 - width, 0), "band", width, 2 * rows - width)
        return curves[0], curves[1]

    def _kernel(self, n: int, lo: int, hi: int, dim: int | None = None) -> tuple[int, list[float]]:
        """Pairs and seconds, forward and backward, of a band in an n x n block."""
        heads, kv_heads, dim = *self.shape[:2], dim or self.shape[2]
        kernel = kernels.select("auto", self.dtype, self.device, dim)
        q, k, v, dout = (self._random(1, n, h, dim) for h in (heads, kv_heads, kv_heads, heads))
        state = kernels.state_dtype(self.dtype)
        out, dq, dk, dv = (torch.zeros_like(x, dtype=state) for x in (q, q, k, v))
        lse = torch.full((1, heads, n), -torch.inf, device=self.device, dtype=state)
        bands = Bands([Band.make(Run(0, n), Run(0, n), lo, hi)])
        scores = kernels.Scores(dim**-0.5)

        def forward() -> None:
            lse.fill_(-torch.inf)
            kernel.forward(q, k, v, bands, None, out, lse, scores)

        forward()
        prepared = kernel.prepare(dout, out.to(self.dtype), lse)

        def backward() -> None:
            kernel.backward(dout, q, k, v, prepared, bands, dq, dk, dv, scores, True, True)

        seconds = [self._time(forward)]
        forward()
        seconds.append(self._time(backward))
        return sum(band.area for band in bands), seconds

    def _bandwidth(self) -> float:
        """Bytes/s of an elementwise operation on more than a cache holds."""
        x, y = (self._random(2**24, dtype=torch.float32) for _ in range(2))
        return 3 * x.nbytes / self._time(lambda: torch.add(x, y, out=y))

    def _host(self) -> float:
        cuda = self.device.type == "cuda"
        x = self._random(2**24, dtype=torch.float32)
        y = torch.empty(x.shape, dtype=x.dtype, pin_memory=cuda)
        return x.nbytes / self._time(lambda: y.copy_(x, non_blocking=True))


def _training(
    description: dict[str, Any],
    ranks: int,
    precision: str,
    engine: EngineCost,
    say: Callable[[str], None],
) -> dict:
    """What a training process costs beyond its arithmetic: seconds of a step and of an operator,
    bytes held before there is a model, and for each byte allocated. From three short runs."""
    hardware = Hardware.read(
        description | {"name": "", "source": "", "dispatch": 0.0, "step": 0.0, "framework": 0.0}
    )
    sizes = {"dim": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "ffn_dim": 704}
    runs = []
    for layers, n in ((2, 512), (8, 512), (8, 4096)):
        model = ModelConfig(layers=layers, vocab_size=257, **sizes)
        plan = make_plan(masks.causal(n), layouts.zigzag(n, ranks), "ring")
        setup = Setup(engine, Memory(), ranks, ranks, precision=precision, device="cpu")
        ahead = predict(model, setup, plan, hardware, list(range(ranks)))
        keys = [f"model.{key}={value}" for key, value in (sizes | {"layers": layers}).items()]
        runs.append((ahead, operators(model, setup), *_train(ranks, n, precision, keys)))
        say(f"a training step of {layers} layers and {n} tokens: {runs[-1][2]:.3f} s")
    (a, ops_a, s_a, m_a), (b, ops_b, s_b, _), (c, _, _, m_c) = runs
    more = [s_a - a.seconds, s_b - b.seconds]
    dispatch = max(0.0, (more[1] - more[0]) / (ops_b - ops_a))
    resident = max(1.0, (m_c - m_a) / (c.memory.device - a.memory.device))
    return {
        "dispatch": dispatch,
        "step": max(0.0, more[0] - dispatch * ops_a),
        "framework": float(m_a - resident * a.memory.device),
        "resident": resident,
    }


def _train(ranks: int, n: int, precision: str, keys: list[str]) -> tuple[float, float]:
    """Median seconds of a step, and peak bytes of rank 0, of a short run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
            str(ranks), "-m", "ringattn.training", *keys, f"seq_len={n}", "attention=causal",
            f"precision={precision}", "logger=none", "train.steps=8", "train.sample_tokens=0",
            "checkpoint.every=null", "hardware=null", "peak_flops=1e9", "device=cpu",
            f'run_dir="{folder}/run"',
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, env=unlaunched())
        if done.returncode:
            raise RuntimeError(f"a short training run failed:\n{done.stdout}{done.stderr}")
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    seconds = statistics.median(step["step_s"] for step in steps[2:])
    return seconds, float(max(step["peak_memory_bytes"] for step in steps))
