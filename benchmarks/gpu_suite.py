"""The Triton kernels on a GPU: right first, then how fast, beside torch's own. Under 8 minutes.

    python benchmarks/gpu_suite.py                    # on one H100 or H200
    python benchmarks/gpu_suite.py --rehearse         # every line of it, tiny, on a CPU

Needs torch 2.9 or newer, Triton, numpy and einops, and this checkout installed
(`pip install --no-deps --no-build-isolation .`); no network. Sections that the time is not enough
for are named in the result. Writes benchmarks/results/DEVICE_DATE.json and .md.

Conventions: FLOPs are 4 x pairs of the mask x heads x head_dim x batch in the forward and 2.5 times
that in the backward, whatever a kernel really computes. Times are medians over CUDA events after
warm-up, contenders in turn, on random inputs larger than the L2 cache; the GPU is kept busy while
the host prepares a call, so that Python's time is not in it. The peak is the median rate of an
8192^3 matrix product in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from unittest import mock

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F
import triton
from ringattn.kernels import Scores
from ringattn.kernels import call as calls
from ringattn.kernels import triton as kernel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import ringattn as ra
from ringattn.comm import VirtualWorld
from ringattn.verify import oracle

RESULTS = Path(__file__).parent / "results"
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
# RMS of the error over that of the values, for standard normal inputs.
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3, torch.float32: 1e-5}


class Suite:
    """One run: its sizes, its clock, and what it has found."""

    def __init__(self, rehearse: bool, seconds: float) -> None:
        self.small = rehearse
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.end = time.monotonic() + seconds
        self.heads, self.tokens = (1, 64) if rehearse else (16, 65536)
        self.turns = 1 if rehearse else 7
        self.half = torch.float16 if rehearse else torch.bfloat16
        name = platform.processor() or "cpu" if rehearse else torch.cuda.get_device_name()
        self.found: dict = {
            "device": name,
            "date": f"{date.today():%Y-%m-%d}",
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "rehearsal": rehearse,
            "not_run": [],
        }

    def left(self, what: str, reserve: float = 0) -> bool:
        """Whether there is time, with ``reserve`` seconds to spare; if not, ``what`` is noted."""
        if self.small or time.monotonic() + reserve < self.end:
            return True
        self.found["not_run"].append(f"{what}: out of time")
        return False

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).to(dtype or self.half)

    def timed(self, calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Seconds of every call, in turn, after one round of warm-up; a call that raises is out."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        host: dict[str, float] = {}  # seconds that the host needs to enqueue a call
        for turn in range(self.turns + 2):
            for name, call in calls.items():
                if name not in times:
                    continue
                try:
                    seconds, host[name] = self._once(call, host.get(name, 0.0) if turn > 1 else 0)
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


def masks(n: int) -> dict[str, ra.Mask]:
    """Window of 1/16; documents from n/4 down to single tokens, halving, again and again."""
    lengths, left = [], n
    while left:
        lengths.append(max(1, min(left, n // 2 ** (2 + len(lengths) % 6))))
        left -= lengths[-1]
    return {
        "causal": ra.masks.causal(n),
        "full": ra.masks.full(n),
        "window": ra.masks.sliding_window(n, max(1, n // 16)),
        "documents": ra.masks.documents(lengths),
    }


def judge(
    got: Sequence[torch.Tensor], want: Sequence[torch.Tensor], dtype: torch.dtype
) -> tuple[dict[str, float], float, bool]:
    """(RMS errors, the worst row over what it may be, the verdict) of out, dq, dk, dv against
    float64. A row, one token of one head, may be off by 16 times the limit of its own size, and by
    4 times that of the mean row: in a row of a single key large terms cancel."""
    errors, worst, limit = {}, 0.0, LIMITS[dtype]
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        off, own = (a.double() - b).norm(dim=-1), b.norm(dim=-1)
        mean = own.square().mean().sqrt()
        errors[name] = (off.square().mean().sqrt() / mean).item()
        worst = max(worst, (off / (16 * limit * own + 4 * limit * mean)).max().item())
    finite = all(error <= limit for error in errors.values())
    return errors, worst, finite and worst <= 1


def correctness(suite: Suite) -> None:
    """out, dq, dk, dv against float64: masks, dtypes, head_dims; then what a ring adds (several
    steps), softcap, batches, and heads that do not fit the L2 cache together."""
    n = 36 if suite.small else 1501
    more = {
        "prefix": ra.masks.prefix_lm(n, n // 3),
        "sinks": ra.masks.sliding_window(n, n // 8) | ra.masks.sinks(n, 4),
        "dilated": ra.masks.dilated(n, n // 4, 3),
        "rows without keys": ra.masks.causal(n)
        - ra.masks.from_slices(ra.masks.full(n // 4, n).slices, n, n),
    }
    dtypes = [torch.float16] if suite.small else [torch.bfloat16, torch.float16]
    cases = [(name, mask, 128, 128, t, {}) for name, mask in masks(n).items() for t in dtypes]
    cases += [(name, mask, 64, 64, dtypes[0], {}) for name, mask in more.items()]
    causal, half = ra.masks.causal(n), dtypes[0]
    for dims in ((64, 64), (96, 96), (192, 128), (192, 192), (256, 256), (80, 40)):
        cases.append(("causal", causal, *dims, half, {}))
    for dim in (64, 128):
        cases.append(("causal", causal, dim, dim, torch.float32, {}))
        cases.append(("softcap", causal, dim, dim, half, {"softcap": 5.0}))
        cases.append(("4 ranks in turn", causal, dim, dim, half, {"ranks": 4}))
    cases.append(("2 sequences, small L2", causal, 64, 64, half, {"batch": 2, "l2": 1}))
    rows = suite.found["correctness"] = []
    for name, mask, dim, v_dim, dtype, how in cases[suite.part[0] :: suite.part[1]]:
        if not suite.left(f"correctness of {name}"):
            break
        row = {"mask": name, "head_dim": f"{dim}/{v_dim}"}
        row["dtype"] = str(dtype).removeprefix("torch.")
        rows.append(row)
        try:
            row["errors"], row["worst_row"], row["right"] = one_case(
                suite, mask, dim, v_dim, dtype, **how
            )
            text = f"{max(row['errors'].values()):.2e}"
        except Exception as error:  # a kernel that does not run is wrong, and the next one may run
            row |= {"errors": dict.fromkeys(("out", "dq", "dk", "dv"), float("inf"))}
            row |= {"worst_row": float("inf"), "right": False, "error": first_line(error)}
            text = row["error"]
        verdict = "right" if row["right"] else "WRONG"
        print(f"{verdict:6s} {name:22s} {row['head_dim']:8s} {row['dtype']:9s} {text}", flush=True)


def one_case(
    suite: Suite, mask: ra.Mask, dim: int, v_dim: int, dtype: torch.dtype,
    softcap: float = 0.0, ranks: int = 1, batch: int = 1, l2: int | None = None,
) -> tuple[dict[str, float], float, bool]:  # fmt: skip
    """One verdict; on ``ranks`` virtual ranks, with ``l2`` bytes of cache in place of the true."""
    n, tensors = mask.n_q, []
    for heads, size in ((4, dim), (2, dim), (2, v_dim), (4, v_dim)):
        tensors.append(suite.random(batch, n, heads, size, dtype=dtype))
    plan = ra.make_plan(mask, ra.layouts.zigzag(n, ranks))

    def work(rank):
        *own, dout = (plan.layout.shard(x, rank.rank) for x in tensors)
        own = [x.contiguous().requires_grad_() for x in own]
        ends = {"kernel": suite.kernel, "softcap": softcap or None}
        out = ra.ring_attention(*own, plan, group=rank, **ends)
        return out.detach(), *torch.autograd.grad(out, own, dout)

    with mock.patch.object(calls, "L2_BYTES", l2 or calls.L2_BYTES):
        parts = VirtualWorld(ranks).run(work)
    got = [plan.layout.unshard(x) for x in zip(*parts, strict=True)]
    return judge(got, oracle(mask, *tensors, softcap), dtype)


def peak(suite: Suite) -> None:
    """The rate of a large matrix product."""
    n = 64 if suite.small else 8192
    a, b = suite.random(n, n), suite.random(n, n)
    times = suite.timed({"matmul": lambda: a @ b})["matmul"]
    suite.found["peak_tflops"] = 2 * n**3 / median(times) / 1e12


def contenders(
    suite: Suite, name: str, mask: ra.Mask, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    flex: Callable | None,
) -> dict[str, Callable[[], torch.Tensor]]:  # fmt: skip
    """Forward calls by name, each on tensors of the layout it likes."""
    plan = whole(mask)
    runs = {"ringattn": lambda: ra.ring_attention(q, k, v, plan, kernel="triton")}
    heads_first = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]
    suite.leaves = {"ringattn": (q, k, v)}
    if name in ("causal", "full"):
        for backend, code in BACKENDS.items():
            suite.leaves[backend] = heads_first

            def torch_own(code=code):
                with sdpa_kernel(SDPBackend.MATH if suite.small else code):
                    return F.scaled_dot_product_attention(*heads_first, is_causal=name == "causal")

            runs[backend] = torch_own
    if flex is not None:
        # On a CPU it has no backward, and refuses inputs that want one.
        inputs = [x.detach() for x in heads_first] if suite.small else heads_first
        suite.leaves["flex"] = inputs
        runs["flex"] = lambda: flex(*inputs)
    return runs


def flex_for(suite: Suite, name: str, mask: ra.Mask) -> Callable:
    """FlexAttention, compiled, with its block mask made beforehand."""
    n, size = mask.n_q, max(1, mask.n_q // 16)
    ids = torch.zeros(n, dtype=torch.int32, device=suite.device)
    for number, part in enumerate(mask.slices):
        if name == "documents":
            ids[part.q.start : part.q.stop] = number
    rule = {
        "causal": lambda b, h, i, j: i >= j,
        "full": lambda b, h, i, j: i >= 0,
        "window": lambda b, h, i, j: (i >= j) & (i - j < size),
        "documents": lambda b, h, i, j: (i >= j) & (ids[i] == ids[j]),
    }[name]
    if not suite.small:
        torch._dynamo.reset()  # or its limit of recompilations would turn the compiler off
    blocks = create_block_mask(rule, None, None, n, n, device=suite.device)
    run = flex_attention if suite.small else torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: run(q, k, v, block_mask=blocks)


def speed(suite: Suite) -> None:
    """Forward and backward, each against torch's own."""
    lengths = [32] if suite.small else [4096, 8192, 16384, 32768, 65536]
    # FlexAttention compiles for every shape and pass, some ten seconds each: not everywhere.
    compared = {
        (32, 64): ("causal", "full", "window", "documents"),
        (32768, 128): ("causal", "window", "documents"),
        (8192, 64): ("window", "documents"),
    }
    rows = suite.found["speed"] = []
    order = [(n, dim) for n in lengths for dim in ((64,) if suite.small else (128, 64))]
    order.sort(key=lambda case: case not in compared)  # what needs most first
    for n, dim in order:
        for name, mask in masks(n).items():
            if not suite.left(f"speed of {name}, {n} tokens, head_dim {dim}", reserve=100):
                continue
            batch = max(1, suite.tokens // n)
            q, k, v = (suite.random(batch, n, suite.heads, dim).requires_grad_() for _ in range(3))
            flex = flex_for(suite, name, mask) if name in compared.get((n, dim), ()) else None
            runs = contenders(suite, name, mask, q, k, v, flex)
            flops = 4 * mask.area * suite.heads * dim * batch
            for which, factor in (("forward", 1.0), ("backward", 2.5)):
                if which == "forward":
                    with torch.no_grad():
                        times = suite.timed(runs)
                else:
                    times = suite.timed(backward_calls(suite, runs))
                row = {"pass": which, "mask": name, "tokens": n, "head_dim": dim, "batch": batch}
                row["tflops"] = {
                    who: [factor * flops / x / 1e12 for x in (median(t), max(t), min(t))]
                    for who, t in times.items()
                    if t
                }
                rows.append(row)
                rates = ", ".join(f"{who} {rate[0]:.0f}" for who, rate in row["tflops"].items())
                print(f"{which:8s} {name:10s} {n:6d} x {dim:3d}: {rates} TFLOP/s", flush=True)


def backward_calls(suite: Suite, runs: dict[str, Callable]) -> dict[str, Callable]:
    """The backward alone of every call that can run its forward."""
    result = {}
    for who, call in runs.items():
        try:
            out = call()
        except Exception:
            continue  # noted by the forward
        grad = torch.randn_like(out)

        def backward(out=out, grad=grad, leaves=suite.leaves[who]):
            return torch.autograd.grad(out, leaves, grad, retain_graph=True)

        result[who] = backward
    return result


def rings(suite: Suite) -> None:
    """All ranks of a ring one after the other: their kernels together, over one whole call."""
    n, dim = (64, 16) if suite.small else (65536, 128)
    rows = suite.found["rings"] = []
    for name in ("causal", "documents"):
        mask = masks(n)[name]
        for world in (2,) if suite.small else (8, 16):
            if not suite.left(f"ring of {world}, {name}"):
                return
            layout = ra.layouts.balanced(mask, world) if name != "causal" else None
            plan = ra.make_plan(mask, layout or ra.layouts.zigzag(n, world), "ring")
            runs = {}
            for label, each in (("one", whole(mask)), ("ring", plan)):
                for which in ("forward", "backward"):
                    runs[f"{label} {which}"] = blocks(suite, each, dim, which)
            times = {who: median(t) for who, t in suite.timed(runs).items()}
            row = {"mask": name, "ranks": world, "tokens": n, "head_dim": dim}
            for which in ("forward", "backward"):
                row[which] = times[f"ring {which}"] / times[f"one {which}"]
            rows.append(row)
            print(f"ring of {world:2d}, {name}: forward {row['forward']:.3f}, backward "
                  f"{row['backward']:.3f} of one call", flush=True)  # fmt: skip


def blocks(suite: Suite, plan: ra.Plan, dim: int, which: str) -> Callable[[], None]:
    """The kernels of all ranks in turn. Left out of what the executor does: the exchanges, the sums
    of gradients that arrive, and the cut of the own block in two in the backward."""
    heads, scores, work = suite.heads, Scores(dim**-0.5), []
    # As the executor has it: one block to compute on, one on its way.
    held: dict[tuple, torch.Tensor] = {}
    grads: dict[tuple, torch.Tensor] = {}
    single = plan.world == 1
    state = suite.half if single else torch.float32
    for rank in range(plan.world):
        own, rows = plan.rank(rank), plan.layout.count(rank)
        q, dout, last = (suite.random(1, rows, heads, dim) for _ in range(3))
        lse = torch.full((1, heads, rows), 8.0, device=suite.device)
        running, dq = torch.zeros_like(q, dtype=state), torch.zeros_like(q, dtype=torch.float32)
        steps = [step for step in own.steps if step.bands]
        for index, step in enumerate(steps):
            out = last if index == len(steps) - 1 else running
            partial = running if index else None
            place = (own.blocks[step.block], index % 2)
            if place not in held:
                held[place] = suite.random(2, 1, place[0], heads, dim)
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


def ranks(suite: Suite) -> None:
    """`ringattn verify` on real processes that share this GPU: NCCL if it lets them, else gloo."""
    rows = suite.found["ranks"] = []
    backends = ["gloo"] if suite.small else ["nccl", "gloo"]
    where = ["device=cpu", "n=48", "dtype=fp16"] if suite.small else ["device=cuda", "n=4096"]
    heads = ["heads=2", "kv_heads=1", f"head_dim={16 if suite.small else 128}", "kernel=triton"]
    for world in (2,) if suite.small else (2, 4):
        for schedule in ("direct",) if suite.small else ("ring", "direct"):
            if not suite.left(f"{world} ranks, {schedule}"):
                return
            for backend in list(backends):
                command = [
                    sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc-per-node", str(world), "-m", "ringattn", "verify", *where, *heads,
                    f"schedule={schedule}", f"backend={backend}", "timeout_s=60", "--json",
                ]  # fmt: skip
                # Not from the checkout: it would hide the installed package, which has the kernels.
                environment = os.environ | {"PYTHONSAFEPATH": "1"}
                environment["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
                environment["OMP_NUM_THREADS"] = "1"
                said, error = answer(command, environment, 90)
                lines = [line for line in said.splitlines() if line.startswith("{")]
                if not lines:
                    backends.remove(backend)  # it will not do so the next time either
                    suite.found["not_run"].append(f"{world} ranks over {backend}: {error[-200:]}")
                    continue
                facts = json.loads(lines[-1])
                row = {"ranks": world, "schedule": schedule, "backend": backend}
                rows.append(row | {"passed": facts["passed"], "errors": facts["errors"]})
                print(f"{world} ranks, {schedule}, {backend}: "
                      f"{'passed' if facts['passed'] else 'FAILED'}", flush=True)  # fmt: skip
                break
            else:
                suite.found["not_run"].append(f"{world} ranks, {schedule}: no backend could")


def answer(command: list[str], environment: dict[str, str], seconds: float) -> tuple[str, str]:
    """(standard output, error) of torchrun; stopped, with its ranks, if it takes too long."""
    job = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        return job.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        job.terminate()  # torchrun stops its ranks, and kills those that do not listen
        try:
            job.communicate(timeout=45)
        except subprocess.TimeoutExpired:
            job.kill()
            job.communicate()
        return "", f"no answer in {seconds:.0f} seconds"


def table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def markdown(found: dict) -> str:
    """The result for people."""
    top = found.get("peak_tflops", float("nan"))
    text = (
        f"# {found['device']}, {found['date']}\n\ntorch {found['torch']}, Triton "
        f"{found['triton']}, CUDA {found['cuda']}. Made by `benchmarks/gpu_suite.py`, which states "
        f"the conventions. Matrix peak in this run: {top:.0f} TFLOP/s.\n"
    )
    if found["rehearsal"]:
        text += "\nA rehearsal on a CPU: no number here means anything.\n"
    wrong = [row for row in found["correctness"] if not row["right"]]
    text += f"\n## Correctness\n\n{len(found['correctness'])} cases, {len(wrong)} wrong. Largest "
    text += "error (RMS over RMS of float64) by dtype:\n\n"
    kinds = sorted({row["dtype"] for row in found["correctness"]})
    text += table(
        ["dtype", "out", "dq", "dk", "dv"],
        [
            [kind]
            + [
                f"{max(r['errors'][x] for r in found['correctness'] if r['dtype'] == kind):.1e}"
                for x in ("out", "dq", "dk", "dv")
            ]
            for kind in kinds
        ],
    )
    text += "\n## Speed\n\nTFLOP/s, median; ratios are ours over theirs.\n\n"
    others = ("flash", "cudnn", "flex")
    rows = []
    for row in sorted(found.get("speed", []), key=lambda r: (r["pass"], r["head_dim"], r["mask"])):
        rates = {who: rate[0] for who, rate in row["tflops"].items()}
        ours = rates.get("ringattn", 0.0)
        rows.append(
            [row["pass"], str(row["head_dim"]), row["mask"], str(row["tokens"]), f"{ours:.0f}"]
            + [f"{ours / top:.0%}"]
            + [f"{rates[o]:.0f} ({ours / rates[o]:.2f})" if o in rates else "" for o in others]
        )
    text += table(["pass", "head_dim", "mask", "tokens", "ours", "of peak", *others], rows)
    text += "\n## Rings\n\nAll kernels of all ranks, over one call on the whole sequence.\n\n"
    text += table(
        ["mask", "ranks", "tokens", "forward", "backward"],
        [
            [r["mask"], *(str(r[x]) for x in ("ranks", "tokens"))]
            + [f"{r[x]:.3f}" for x in ("forward", "backward")]
            for r in found.get("rings", [])
        ],
    )
    text += "\n## Real ranks on this one GPU\n\n"
    text += table(
        ["ranks", "schedule", "backend", "verdict"],
        [
            [str(r["ranks"]), r["schedule"], r["backend"], "passed" if r["passed"] else "FAILED"]
            for r in found.get("ranks", [])
        ],
    )
    if found["not_run"]:
        text += "\nNot run: " + "; ".join(dict.fromkeys(found["not_run"])) + ".\n"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--seconds", type=float, default=450, help="after which nothing is begun")
    parser.add_argument("--only", help="sections, with commas between; all unless given")
    parser.add_argument("--kernel", default="triton")
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--to", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        print("gpu_suite.py: torch sees no GPU here; --rehearse runs it on a CPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    suite = Suite(options.rehearse, options.seconds)
    suite.kernel, suite.part = options.kernel, [int(x) for x in options.part.split("/")]
    print(f"{suite.found['device']}, torch {torch.__version__}, Triton {triton.__version__}")
    options.to.mkdir(parents=True, exist_ok=True)
    name = f"{suite.found['device']}_{suite.found['date']}".replace(" ", "-").lower()
    for section in (correctness, peak, rings, speed, ranks):
        if options.only and section.__name__ not in options.only.split(","):
            continue
        try:
            section(suite)
        except Exception as error:  # the other sections are worth having
            suite.found["not_run"].append(f"{section.__name__}: {first_line(error)}")
        # After every section: what a time limit cuts off keeps what was measured.
        (options.to / f"{name}.json").write_text(json.dumps(suite.found, indent=1) + "\n")
    (options.to / f"{name}.md").write_text(markdown(suite.found))
    print(f"written: {options.to / name}.json and .md")
    verdicts = [row["right"] for row in suite.found["correctness"]]
    verdicts += [row["passed"] for row in suite.found.get("ranks", [])]
    return int(not verdicts or not all(verdicts) or "peak_tflops" not in suite.found)


if __name__ == "__main__":
    raise SystemExit(main())
