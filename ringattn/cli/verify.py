"""``ringattn verify``: distributed attention against float64, where you are going to run it.

Under torchrun every process is a rank; otherwise all ranks are threads of this process. The same
inputs go through the plan, through one kernel call on the whole sequence, and through dense
float64. The verdict: out, dq, dk and dv are no further from float64 than the one call, times 1.1,
as a whole, and no row of them is off by more than its rounding (:mod:`ringattn.verify`).
"""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from math import gcd, isfinite
from typing import Any

import torch
import torch.distributed as dist

from ringattn import kernels
from ringattn.cli.request import (
    PLAN_KEYS,
    Key,
    RequestError,
    choice,
    count,
    drawable,
    integer,
    keys_of,
    layout_of,
    parse,
    planned,
)
from ringattn.execution.attention import ring_attention
from ringattn.execution.carriers import VirtualWorld, end_distributed
from ringattn.make import make_plan
from ringattn.planning.layouts import contiguous
from ringattn.planning.masks import Mask
from ringattn.planning.plan import Plan
from ringattn.verify import LIMIT, Comparison, compare, oracle

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
NAMES = ("out", "dq", "dk", "dv")
_TOKENS = 1024  # where neither n nor the mask says how many

KEYS = PLAN_KEYS | {
    "n": Key(count, None, "tokens, where the mask does not say; 1024 unless given"),
    "ranks": Key(count, None, "virtual ranks without torchrun; 4 unless given"),
    "kernel": Key(str, "auto", f"auto, {', '.join(kernels.NAMES)}"),
    "device": Key(choice("auto", "cpu", "cuda"), "auto", "auto, cpu, cuda"),
    "backend": Key(str, None, "of torch.distributed; by default nccl on cuda, gloo on cpu"),
    "timeout_s": Key(count, 300, "seconds until a silent rank is an error"),
    "seed": Key(integer, 0, "of the inputs"),
}


def _flags(parser: ArgumentParser) -> None:
    parser.add_argument("--plot", metavar="FILE", help="error against number of ranks (PNG, SVG)")
    parser.add_argument("--json", action="store_true", help="for machines")


def run(arguments: Sequence[str]) -> int:
    """The command; 0 if the verdict is good, 1 if not."""
    values, options = parse("verify", KEYS, arguments, _flags)
    device = _device(values["device"])
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if launched and values["ranks"]:
        raise RequestError("ranks= is for one process; torchrun has set the number of ranks")
    world = int(os.environ["WORLD_SIZE"]) if launched else values["ranks"] or 4
    plan = planned(values, world, _TOKENS)
    try:
        dims = (values["head_dim"], values["v_dim"])
        kernels.select(values["kernel"], DTYPES[values["dtype"]], device, *dims)
    except ValueError as error:
        raise RequestError(str(error)) from None
    if options.plot:
        drawable(options.plot)
    if not launched:
        if values["backend"]:
            raise RequestError(f"backend={values['backend']} needs torchrun: this is one process")
        return _verified(values, options, plan, device, launched)
    backend = values["backend"] or ("nccl" if device.type == "cuda" else "gloo")
    try:
        dist.init_process_group(
            backend,
            timeout=timedelta(seconds=values["timeout_s"]),
            # NCCL connects at once then: made lazily, its first exchange would need all ranks.
            device_id=device if backend == "nccl" else None,
        )
    except (ValueError, RuntimeError, AssertionError) as error:
        raise RequestError(f"backend={backend}: {str(error).splitlines()[0]}") from None
    try:
        return _verified(values, options, plan, device, launched)
    finally:
        end_distributed()


def _device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise RequestError("device=cuda, but torch sees no GPU here; use device=cpu")
    if name == "cpu" or not available:
        return torch.device("cpu")
    # More ranks than GPUs share them: slow, but a way to try a split.
    local = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


def _verified(
    values: dict[str, Any], options: Namespace, plan: Plan, device: torch.device, launched: bool
) -> int:
    inputs = _inputs(values, plan.mask, device)
    got = _over_processes(plan, inputs, values) if launched else _over_threads(plan, inputs, values)
    if got is None:
        return 0  # rank 0 has everything and gives the verdict; nobody waits for it
    want = oracle(plan.mask, *inputs)
    whole = _over_threads(_one_call(plan.mask), inputs, values)
    results = {
        name: compare(a, b, c) for name, a, b, c in zip(NAMES, got, whole, want, strict=True)
    }
    passed = all(result.ok for result in results.values())
    facts = {
        "plan": str(plan),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "ranks": plan.world,
        "processes": launched,
        "dtype": values["dtype"],
        "errors": {name: asdict(result) for name, result in results.items()},
        "passed": passed,
    }
    if options.plot:
        facts["curve"] = _curve(values, plan, inputs, want, whole, options.plot)
    print(json.dumps(_finite(facts))) if options.json else _print(facts, results)
    return int(not passed)


def _finite(value: Any) -> Any:
    """Infinite errors as null: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not isfinite(value) else value


def _inputs(values: dict[str, Any], mask: Mask, device: torch.device) -> list[torch.Tensor]:
    """[q, k, v, dout] of the whole sequence, alike on every rank."""
    generator = torch.Generator().manual_seed(values["seed"])
    heads, dim = values["heads"], values["head_dim"]
    kv_heads, v_dim = values["kv_heads"] or heads, values["v_dim"] or dim
    dtype = DTYPES[values["dtype"]]
    shapes = [
        (mask.n_q, heads, dim),
        (mask.n_k, kv_heads, dim),
        (mask.n_k, kv_heads, v_dim),
        (mask.n_q, heads, v_dim),
    ]
    return [
        torch.randn(values["batch"], *shape, generator=generator).to(device, dtype)
        for shape in shapes
    ]


def _local(plan: Plan, rank: int, group: Any, inputs: Sequence[torch.Tensor], kernel: str):
    """(out, dq, dk, dv) of one rank."""
    q, k, v, dout = inputs
    own = [
        layout.shard(x, rank).requires_grad_()
        for layout, x in ((plan.layout, q), (plan.key_layout, k), (plan.key_layout, v))
    ]
    out = ring_attention(*own, plan, group=group, kernel=kernel)
    return out.detach(), *torch.autograd.grad(out, own, plan.layout.shard(dout, rank))


def _together(plan: Plan, parts: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    layouts = (plan.layout, plan.layout, plan.key_layout, plan.key_layout)
    return [
        layout.unshard(some) for layout, some in zip(layouts, zip(*parts, strict=True), strict=True)
    ]


def _over_threads(
    plan: Plan, inputs: Sequence[torch.Tensor], values: dict[str, Any]
) -> list[torch.Tensor]:
    work = VirtualWorld(plan.world, values["timeout_s"]).run(
        lambda rank: _local(plan, rank.rank, rank, inputs, values["kernel"])
    )
    return _together(plan, work)


def _over_processes(
    plan: Plan, inputs: Sequence[torch.Tensor], values: dict[str, Any]
) -> list[torch.Tensor] | None:
    """The result on rank 0, None elsewhere."""
    rank = dist.get_rank()
    own = [x.cpu() for x in _local(plan, rank, None, inputs, values["kernel"])]
    parts = [None] * plan.world if rank == 0 else None
    dist.gather_object(own, parts)
    if parts is None:
        return None
    return [x.to(inputs[0].device) for x in _together(plan, parts)]


def _one_call(mask: Mask) -> Plan:
    keys = contiguous(mask.n_k, 1)
    return make_plan(mask, contiguous(mask.n_q, 1), key_layout=keys)


def _curve(
    values: dict[str, Any],
    plan: Plan,
    inputs: Sequence[torch.Tensor],
    want: Sequence[torch.Tensor],
    whole: Sequence[torch.Tensor],
    file: str,
) -> dict[str, Any]:
    """Errors over those of one call for 1, 2, 4, 8, 16 virtual ranks on this device, drawn too."""
    from ringattn.cli.pictures import draw_errors

    ranks = (1, 2, 4, 8, 16)
    curves: dict[str, list[float]] = {name: [] for name in NAMES}
    for world in ranks:
        mask = plan.mask
        some = make_plan(
            mask,
            layout_of(values["layout"], mask, world, values["chunk"]),
            plan.schedule,
            gcd(plan.ulysses, world),
            key_layout=None if mask.n_q == mask.n_k else keys_of(values["layout"], mask, world),
            node_size=gcd(plan.node_size, world),
        )
        for name, a, b, c in zip(
            NAMES, _over_threads(some, inputs, values), whole, want, strict=True
        ):
            curves[name].append(compare(a, b, c).ratio)
    title = f"{plan.schedule}, {plan.layout.name}, {values['dtype']}, mask {values['mask']}"
    draw_errors(curves, ranks, title, file)
    return {"ranks": list(ranks), **curves}


def _print(facts: dict[str, Any], results: dict[str, Comparison]) -> None:
    from rich.console import Console  # here: machines ask for --json, and may have no rich
    from rich.table import Table

    console = Console(highlight=False)
    kind = "processes" if facts["processes"] else "virtual ranks of one process"
    console.print(facts["plan"], soft_wrap=True)
    where = f"{facts['dtype']}, {facts['device']}, torch {facts['torch']}"
    console.print(f"{facts['ranks']} {kind}, {where}")
    table = Table()
    for title in ("", "RMS error", "of one call", "ratio", "worst row", ""):
        table.add_column(title, justify="right")
    for name, result in results.items():
        verdict = "[green]ok[/green]" if result.ok else "[red]WRONG[/red]"
        table.add_row(
            name,
            f"{result.ours:.3e}",
            f"{result.one_call:.3e}",
            f"{result.ratio:.3f}",
            f"{result.worst:.2f} of what it may be",
            verdict,
        )
    console.print(table)
    for name, result in results.items():
        if not result.ok:
            batch, token, head = result.worst_at
            console.print(f"{name} is furthest off at token {token}, head {head}, batch {batch}")
    if facts["passed"]:
        console.print(f"[green]PASSED[/green]: as close to float64 as one call (x {LIMIT})")
    else:
        console.print(f"[red]FAILED[/red]: further from float64 than {LIMIT} x one kernel call")
