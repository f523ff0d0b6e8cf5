"""What other programs say about the kernels on a GPU: Nsight Compute, compute-sanitizer, and
`ringattn verify` on real ranks. Sections of gpu_suite.py, which runs them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu_suite import Suite


def profile(suite: Suite) -> None:
    """Nsight Compute on one launch of each Gluon kernel, where it is installed."""
    if suite.small or not shutil.which("ncu") or not suite.left("ncu", reserve=60):
        return
    code = (
        "import torch, ringattn as ra; n = 16384; "
        "q, k, v = (torch.randn(1, n, 16, 128, device='cuda').bfloat16().requires_grad_() "
        "for _ in range(3)); plan = ra.make_plan(ra.masks.causal(n), "
        "ra.layouts.contiguous(n, 1)); out = ra.ring_attention(q, k, v, plan, kernel='gluon'); "
        "out.backward(torch.randn_like(out))"
    )
    metrics = (
        "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active,"
        "sm__throughput.avg.pct_of_peak_sustained_elapsed,"
        "lts__t_sectors.sum,dram__bytes.sum,gpu__time_duration.sum,"
        "sm__inst_issued.avg.pct_of_peak_sustained_active"
    )
    # The self-check on a small input comes first: the last launches are the large ones.
    command = ["ncu", "--clock-control", "none", "--csv", "--metrics", metrics,
               "-k", "regex:^(forward|backward)$", sys.executable, "-c", code]  # fmt: skip
    said, error = answer(command, os.environ | {"PYTHONSAFEPATH": "1"}, 60)
    suite.found["ncu"] = [line for line in said.splitlines() if line.startswith('"')][-12:]
    if not suite.found["ncu"]:
        suite.found["not_run"].append(f"ncu: {(error or said)[-300:]}")


def sanitizer(suite: Suite) -> None:
    """compute-sanitizer's memcheck on a tiny forward and backward, where it is installed."""
    tool = "compute-sanitizer"
    if suite.small or not shutil.which(tool) or not suite.left(tool, reserve=45):
        return
    code = (
        "import torch; from ringattn.kernels.gluon import check; "
        "print('verdict', check.disagreement(torch.device('cuda'), torch.bfloat16, 128, 128))"
    )
    # Calls of the driver that fail are not counted: Triton 3.9 tries an attribute of functions that
    # the driver may refuse.
    command = [tool, "--tool", "memcheck", "--report-api-errors", "no", sys.executable, "-c", code]
    said, error = answer(command, os.environ | {"PYTHONSAFEPATH": "1"}, 60)
    wanted = [line for line in said.splitlines() if "ERROR SUMMARY" in line or "verdict" in line]
    suite.found["sanitizer"] = wanted or [(error or said)[-300:]]
    print(*suite.found["sanitizer"], sep="\n", flush=True)


def ranks(suite: Suite) -> None:
    """`ringattn verify` on real processes that share this GPU: NCCL if it lets them, else gloo."""
    rows = suite.found["ranks"] = []
    backends = ["gloo"] if suite.small else ["nccl", "gloo"]
    where = ["device=cpu", "n=48", "dtype=fp16"] if suite.small else ["device=cuda", "n=4096"]
    heads = ["heads=2", "kv_heads=1", f"head_dim={16 if suite.small else 128}"]
    heads.append("kernel=triton" if suite.small else "kernel=auto")
    for world in (2,) if suite.small else (2, 4):
        for schedule in ("direct",) if suite.small else ("ring", "direct"):
            if not suite.left(f"{world} ranks, {schedule}", reserve=40):
                return
            for backend in list(backends):
                command = [
                    sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc-per-node", str(world), "-m", "ringattn", "verify", *where, *heads,
                    f"schedule={schedule}", f"backend={backend}", "timeout_s=30", "--json",
                ]  # fmt: skip
                # Not from the checkout: it would hide the installed package, which has the kernels.
                environment = os.environ | {"PYTHONSAFEPATH": "1"}
                environment["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
                environment["OMP_NUM_THREADS"] = "1"
                said, error = answer(command, environment, 60)
                lines = [line for line in said.splitlines() if line.startswith("{")]
                if not lines:
                    backends.remove(backend)  # it will not do so the next time either
                    why = [x for x in error.splitlines() if "NCCL" in x or "rror:" in x]
                    suite.found["not_run"].append(f"{world} ranks over {backend}: {why[:2]}")
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
