"""The fused kernels on a GPU: right first, then how fast, beside torch's own.

    python benchmarks/gpu_suite.py                    # on one H100 or H200; about five minutes
    python benchmarks/gpu_suite.py --sections first   # right, repeatable and how fast, in one
    python benchmarks/gpu_suite.py --rehearse         # every line of it, tiny, on a CPU

Needs torch 2.9 or newer, Triton, numpy and einops, and this checkout installed
(`pip install --no-deps --no-build-isolation .`); no network; with .venv/fla on PYTHONPATH (see
Makefile) mixers are measured with flash-linear-attention's kernels too. Each section writes its
result at once; those that the time is not enough for are named. Writes DEVICE_DATE.json and .md
under benchmarks/results.

Conventions: FLOPs are 2 x pairs of the mask x heads x (head_dim + v's) x batch in the forward and
2.5 times that in the backward, whatever a kernel really computes. The backward of ours contains all
of it: preparation, zeros, the final cast of dq. Times are medians over CUDA events after warm-up,
contenders in a new random order each turn, on random inputs larger than the L2 cache; the GPU is
kept busy while the host prepares a call, so that Python's time is not in it. The peak is the median
rate of an 8192^3 matrix product in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from itertools import chain
from pathlib import Path
from statistics import median

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = os.environ["GPU_SUITE_REHEARSAL"] = "1"

import torch
import torch.nn.functional as F
import triton
from ringattn.kernels import Scores, select
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import ringattn as ra
from ringattn.verify import oracle

sys.path.insert(0, str(Path(__file__).parent))
from gpu_cases import ENGINES, judge, masks
from gpu_page import markdown
from gpu_programs import answer, profile, ranks, sanitizer
from gpu_states import states

RESULTS = Path(__file__).parent / "results"
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


class Suite:
    """One run: its sizes, its clock, and what it has found."""

    def __init__(self, rehearse: bool, seconds: float) -> None:
        self.small = rehearse
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.end = time.monotonic() + seconds
        self.heads, self.tokens = (1, 64) if rehearse else (16, 32768)
        self.turns = 1 if rehearse else 9
        self.half = torch.float16 if rehearse else torch.bfloat16
        self.random = random.Random(0)
        name = platform.processor() or "cpu" if rehearse else torch.cuda.get_device_name()
        self.found: dict = {
            "device": name,
            "date": f"{date.today():%Y-%m-%d}",
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "commit": os.environ.get("COMMIT", ""),
            "rehearsal": rehearse,
            "not_run": [],
            "seconds": {},
        }

    def left(self, what: str, reserve: float = 0) -> bool:
        """Whether there is time, with ``reserve`` seconds to spare; if not, ``what`` is noted."""
        if self.small or time.monotonic() + reserve < self.end:
            return True
        self.found["not_run"].append(f"{what}: out of time")
        return False

    def draw(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).to(dtype or self.half)

    def timed(self, calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Seconds of every call, in random turns, after two rounds of warm-up; a call that raises
        is out."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        host: dict[str, float] = {}  # seconds that the host needs to enqueue a call
        for turn in range(self.turns + 2):
            for name in self.random.sample(list(times), len(times)):
                try:
                    busy = host.get(name, 0.0) if turn > 1 else 0
                    seconds, host[name] = self._once(calls[name], busy)
                except (
                    Exception
                ) as error:  # Triton's, torch's and the compiler's have no common one
                    self.found["not_run"].append(f"{name}: {first_line(error)}")
                    del times[name]
                    continue
                if turn > 1:  # the first turn compiles
                    times[name].append(seconds)
        return times

    def _once(self, call: Callable[[], object], busy: float) -> tuple[float, float]:
        """(seconds of the call, seconds until it was enqueued), begun after ``busy`` seconds."""
        if self.device.type == "cpu":
            begun = time.perf_counter()
            call()
            return time.perf_counter() - begun, 0.0
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if busy:
            torch.cuda._sleep(int(min(0.1, 1.5 * busy) * 2e9))  # in cycles of at most 2 GHz
        begin.record()
        begun = time.perf_counter()
        call()
        enqueued = time.perf_counter() - begun
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3, enqueued


def first_line(error: Exception) -> str:
    return f"{type(error).__name__} {str(error).strip().splitlines()[:1]}"[:160]


def whole(mask: ra.Mask) -> ra.Plan:
    """The plan of one rank."""
    return ra.make_plan(mask, ra.layouts.contiguous(mask.n_q, 1))


def correctness(suite: Suite) -> None:
    """The cases of gpu_cases.py, in eight processes, since compiling is most of the time."""
    shares = 1 if suite.small else 16
    script = Path(__file__).with_name("gpu_cases.py")

    def share(number: int) -> list[dict]:
        said, error = answer([sys.executable, script, f"{number}/{shares}"], dict(os.environ), 150)
        rows = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        if not rows:
            suite.found["not_run"].append(f"correctness, share {number}: {error[-300:]}")
        return rows

    with ThreadPoolExecutor(shares) as pool:
        rows = suite.found["correctness"] = list(
            chain.from_iterable(pool.map(share, range(shares)))
        )
    for row in rows:
        text = f"{max(row['errors'].values()):.2e}" if "error" not in row else row["error"]
        print(f"{'right' if row['right'] else 'WRONG'} {row['kernel']:7s}{row['mask']:22s} "
              f"{row['head_dim']:8s} {row['dtype']:9s} {text}", flush=True)  # fmt: skip


def first(suite: Suite) -> None:
    """Causal, 16k, head_dim 128: how far two of the heads are from float64, whether 20 repeats give
    the same bits, and the speed beside torch's own."""
    n, dim = (40, 16) if suite.small else (16384, 128)
    mask = ra.masks.causal(n)
    plan = whole(mask)
    q, k, v, dout = (suite.draw(1, n, suite.heads, dim) for _ in range(4))
    some = [0, suite.heads - 1]
    want = oracle(mask, *(x[:, :, some] for x in (q, k, v, dout)))
    rows = suite.found["first"] = {}
    for kernel in ENGINES:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]

        def both(leaves=leaves, kernel=kernel):
            out = ra.ring_attention(*leaves, plan, kernel=kernel)
            return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

        before = both()
        again = (both() for _ in range(1 if suite.small else 20))
        same = all(torch.equal(a, b) for x in again for a, b in zip(before, x, strict=True))
        errors, _, right = judge([x[:, :, some] for x in before], want, suite.half)
        rows[kernel] = {"same": same, "errors": errors, "right": right}
        print(f"{kernel}: 20 times the same bits: {same}; right: {right}, "
              f"{max(errors.values()):.2e} off", flush=True)  # fmt: skip
    del before, want
    race(suite, SHAPES[0])


def peak(suite: Suite) -> None:
    """The rate of a large matrix product."""
    n = 64 if suite.small else 8192
    a, b = suite.draw(n, n), suite.draw(n, n)
    times = suite.timed({"matmul": lambda: a @ b})["matmul"]
    suite.found["peak_tflops"] = 2 * n**3 / median(times) / 1e12


# (tokens, heads, K/V heads, head_dim, v_dim, mask); documents of 300 tokens are a packed batch.
SHAPES = [
    (16384, 16, 16, 128, 128, "causal"),
    (16384, 16, 16, 128, 128, "full"),
    (32768, 16, 16, 128, 128, "causal"),
    (4096, 16, 16, 128, 128, "causal"),
    (16384, 32, 8, 128, 128, "causal"),
    (16384, 16, 16, 128, 128, "window"),
    (16384, 16, 16, 128, 128, "documents of 300"),
    (16384, 16, 16, 64, 64, "causal"),
    (16384, 16, 16, 64, 64, "full"),
    (16384, 16, 16, 96, 96, "causal"),
    (16384, 16, 16, 192, 128, "causal"),
    (16384, 16, 16, 256, 256, "causal"),
]


def speed(suite: Suite) -> None:
    """Forward and backward of the other shapes."""
    for shape in SHAPES[1:]:
        if suite.left(f"speed of {shape}", reserve=20):
            race(suite, shape)


def race(suite: Suite, shape: tuple[int, int, int, int, int, str]) -> None:
    """Forward and backward of one shape, each engine against torch's own."""
    n, heads, kv_heads, dim, v_dim, name = shape
    if suite.small:
        n, heads, kv_heads, dim, v_dim = 32, 1, 1, 64, 64
    lengths = [300] * (n // 300) + [n % 300]
    mask = ra.masks.documents(lengths) if name[-1] == "0" else masks(n)[name]
    batch = max(1, suite.tokens // n)
    sizes = ((heads, dim), (kv_heads, dim), (kv_heads, v_dim))
    tensors = [suite.draw(batch, n, *size) for size in sizes]
    runs = contenders(suite, name, mask, tensors)
    flops = 2 * mask.area * heads * (dim + v_dim) * batch
    for which, factor in (("forward", 1.0), ("backward", 2.5)):
        if which == "forward":
            with torch.no_grad():
                times = suite.timed({who: call for who, (call, _) in runs.items()})
        else:
            times = suite.timed(backward_calls(runs))
        row = {"pass": which, "mask": name, "tokens": n, "batch": batch}
        row |= {"head_dim": f"{dim}" if dim == v_dim else f"{dim}/{v_dim}"}
        row |= {"heads": f"{heads}" if heads == kv_heads else f"{heads} over {kv_heads}"}
        row["tflops"] = {
            who: [factor * flops / x / 1e12 for x in (median(t), max(t), min(t))]
            for who, t in times.items()
            if t
        }
        suite.found.setdefault("speed", []).append(row)
        rates = ", ".join(f"{who} {rate[0]:.0f}" for who, rate in row["tflops"].items())
        print(f"{which:8s} {name:10s} {n:6d} x {row['head_dim']}: {rates} TFLOP/s", flush=True)


def contenders(
    suite: Suite, name: str, mask: ra.Mask, tensors: list[torch.Tensor]
) -> dict[str, tuple[Callable[[], torch.Tensor], list[torch.Tensor]]]:
    """(forward call, what it differentiates) by name, each on tensors of the layout it likes."""
    plan, runs = whole(mask), {}
    for kernel in ENGINES:
        leaves = [x.detach().requires_grad_() for x in tensors]

        def ours(leaves=leaves, kernel=kernel):
            return ra.ring_attention(*leaves, plan, kernel=kernel)

        runs[kernel] = ours, leaves
    if name in ("causal", "full") and tensors[0].shape[2] == tensors[1].shape[2]:
        leaves = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in tensors]
        for backend, code in BACKENDS.items():

            def torchs(code=code, leaves=leaves):
                with sdpa_kernel(SDPBackend.MATH if suite.small else code):
                    return F.scaled_dot_product_attention(*leaves, is_causal=name == "causal")

            runs[backend] = torchs, leaves
    elif tensors[0].shape[2] == tensors[1].shape[2]:
        leaves = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in tensors]
        if suite.small:  # on a CPU it has no backward, and refuses inputs that want one
            leaves = [x.detach() for x in leaves]
        try:
            flex = flex_for(suite, name, mask)
            runs["flex"] = (lambda: flex(*leaves)), leaves
        except Exception as error:
            suite.found["not_run"].append(f"flex: {first_line(error)}")
    return runs


def backward_calls(runs: dict) -> dict[str, Callable]:
    """The backward alone of every call that can run its forward."""
    result = {}
    for who, (call, leaves) in runs.items():
        try:
            out = call()
        except Exception:
            continue  # noted by the forward
        grad = torch.randn_like(out)

        def backward(out=out, grad=grad, leaves=leaves):
            return torch.autograd.grad(out, leaves, grad, retain_graph=True)

        result[who] = backward
    return result


def flex_for(suite: Suite, name: str, mask: ra.Mask) -> Callable:
    """FlexAttention, compiled, with its block mask made beforehand."""
    n, size = mask.n_q, max(1, mask.n_q // 16)
    ids = torch.zeros(n, dtype=torch.int32, device=suite.device)
    for number, part in enumerate(mask.slices):
        if name.startswith("documents"):
            ids[part.q.start : part.q.stop] = number
    rule = {
        "causal": lambda b, h, i, j: i >= j,
        "full": lambda b, h, i, j: i >= 0,
        "window": lambda b, h, i, j: (i >= j) & (i - j < size),
        "documents": lambda b, h, i, j: (i >= j) & (ids[i] == ids[j]),
    }[name.split()[0]]
    if not suite.small:
        torch._dynamo.reset()  # or its limit of recompilations would turn the compiler off
    blocks = create_block_mask(rule, None, None, n, n, device=suite.device)
    run = flex_attention if suite.small else torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: run(q, k, v, block_mask=blocks)


def rings(suite: Suite) -> None:
    """All ranks of a ring one after the other: their kernels together, over one whole call."""
    n, dim = (64, 16) if suite.small else (32768, 128)
    rows = suite.found["rings"] = []
    for kernel in ENGINES:
        for name in ("causal", "documents"):
            world = 2 if suite.small else 8
            if not suite.left(f"ring of {world}, {name}, {kernel}", reserve=15):
                return
            mask = masks(n)[name]
            layout = ra.layouts.balanced(mask, world) if name != "causal" else None
            plan = ra.make_plan(mask, layout or ra.layouts.zigzag(n, world), "ring")
            runs = {}
            for label, each in (("one", whole(mask)), ("ring", plan)):
                for which in ("forward", "backward"):
                    runs[f"{label} {which}"] = blocks(suite, kernel, each, dim, which)
            times = {who: median(t) for who, t in suite.timed(runs).items()}
            row = {"kernel": kernel, "mask": name, "ranks": world, "tokens": n, "head_dim": dim}
            for which in ("forward", "backward"):
                row[which] = times[f"ring {which}"] / times[f"one {which}"]
            rows.append(row)
            print(f"ring of {world:2d}, {kernel}, {name}: forward {row['forward']:.3f}, backward "
                  f"{row['backward']:.3f} of one call", flush=True)  # fmt: skip


def blocks(suite: Suite, name: str, plan: ra.Plan, dim: int, which: str) -> Callable[[], None]:
    """The kernels of all ranks in turn. Left out of what the executor does: the exchanges, the sums
    of gradients that arrive, and the cut of the own block in two in the backward."""
    kernel = select(name, suite.half, suite.device, dim)
    heads, scores, work = suite.heads, Scores(dim**-0.5), []
    # As the executor has it: one block to compute on, one on its way.
    held: dict[tuple, torch.Tensor] = {}
    grads: dict[tuple, torch.Tensor] = {}
    state = suite.half if plan.world == 1 else torch.float32
    for rank in range(plan.world):
        own, rows = plan.rank(rank), plan.layout.count(rank)
        q, dout, last = (suite.draw(1, rows, heads, dim) for _ in range(3))
        lse = torch.full((1, heads, rows), 8.0, device=suite.device)
        running, dq = torch.zeros_like(q, dtype=state), torch.zeros_like(q, dtype=torch.float32)
        steps = [step for step in own.steps if step.bands]
        for index, step in enumerate(steps):
            out = last if index == len(steps) - 1 else running
            partial = running if index else None
            place = (own.blocks[step.block], index % 2)
            if place not in held:
                held[place] = suite.draw(2, 1, place[0], heads, dim)
                grads[place] = torch.empty_like(held[place], dtype=state)
            kv, dkv = held[place], grads[place]
            work.append((q, kv, step, partial, out, lse, dout, dq, dkv, index))

    def forward() -> None:
        for q, (k, v), step, partial, out, lse, *_ in work:
            kernel.forward(q, k, v, step.bands, partial, out, lse, scores)

    def backward() -> None:
        prepared = None
        for q, (k, v), step, _, out, lse, dout, dq, (dk, dv), index in work:
            if index == 0:
                prepared = kernel.prepare(dout, out.to(q.dtype), lse)
            ends = (scores, index > 0, False)
            kernel.backward(dout, q, k, v, prepared, step.bands, dq, dk, dv, *ends)

    return forward if which == "forward" else backward


def host(suite: Suite) -> None:
    """Microseconds until a call is enqueued, of a tiny one that the GPU has done in no time; in
    random turns, since the first ones find everything cold."""
    plan = whole(ra.masks.causal(64))
    calls: dict[str, Callable[[], object]] = {}
    for kernel in ENGINES:
        leaves = [suite.draw(1, 64, 2, 64).requires_grad_() for _ in range(3)]
        out = ra.ring_attention(*leaves, plan, kernel=kernel)
        grad = torch.ones_like(out)
        calls[f"{kernel} forward"] = lambda a=leaves, k=kernel: ra.ring_attention(
            *a, plan, kernel=k
        )
        calls[f"{kernel} backward"] = lambda a=leaves, o=out, g=grad: torch.autograd.grad(
            o, a, g, retain_graph=True
        )
    calls["a tensor of zeros"] = lambda: torch.zeros(4, device=suite.device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(3 if suite.small else 320):
        for name in suite.random.sample(list(calls), len(calls)):
            begun = time.perf_counter()
            calls[name]()
            took = time.perf_counter() - begun
            if not suite.small:
                torch.cuda.synchronize()
            if turn >= (1 if suite.small else 20):
                times[name].append(1e6 * took)
    rows = suite.found["host"] = {name: median(each) for name, each in times.items()}
    for name, each in rows.items():
        print(f"host, {name}: {each:.0f} us", flush=True)


# In this order unless asked for otherwise: what says most comes first.
SECTIONS = {
    section.__name__: section
    for section in (first, correctness, peak, speed, rings, states, host, sanitizer, profile, ranks)
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--seconds", type=float, default=450, help="after which nothing is begun")
    parser.add_argument("--sections", nargs="*", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--to", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        print("gpu_suite.py: torch sees no GPU here; --rehearse runs it on a CPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    suite = Suite(options.rehearse, options.seconds)
    print(f"{suite.found['device']}, torch {torch.__version__}, Triton {triton.__version__}")
    options.to.mkdir(parents=True, exist_ok=True)
    name = f"{suite.found['device']}_{suite.found['date']}".replace(" ", "-").lower()
    for section in options.sections:
        begun = time.monotonic()
        try:
            SECTIONS[section](suite)
        except Exception as error:  # the other sections are worth having
            suite.found["not_run"].append(f"{section}: {first_line(error)}")
        suite.found["seconds"][section] = round(time.monotonic() - begun, 1)
        # After every section: what a time limit cuts off keeps what was measured.
        (options.to / f"{name}.json").write_text(json.dumps(suite.found, indent=1) + "\n")
        (options.to / f"{name}.md").write_text(markdown(suite.found))
    print(f"written: {options.to / name}.json and .md")
    verdicts = [row["right"] for row in suite.found.get("correctness", [])]
    verdicts += [row["passed"] for row in suite.found.get("ranks", [])]
    judged = ("right", "same", "fla right")
    verdicts += [row[x] for row in suite.found.get("states", []) for x in judged if x in row]
    verdicts += [x[y] for x in suite.found.get("first", {}).values() for y in ("right", "same")]
    return int(not verdicts or not all(verdicts))


if __name__ == "__main__":
    raise SystemExit(main())
