"""``ringattn plan``: a plan as a table, as JSON, proven, or as a picture. Needs no torch."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict

from ringattn import cost
from ringattn.cli.request import (
    ITEMSIZE,
    PLAN_KEYS,
    Key,
    RequestError,
    count,
    drawable,
    parse,
    planned,
)
from ringattn.cost import AttentionShape
from ringattn.planning.plan import Plan
from ringattn.planning.prove import check

KEYS = PLAN_KEYS | {"world": Key(count, 8, "ranks")}
_TOKENS = 2**16  # where neither n nor the mask says how many
_ROWS = 16  # ranks that the table shows one by one


def _flags(parser: ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="prove the plan; status 1 if it fails")
    parser.add_argument("--plot", metavar="FILE", help="draw mask, work and timeline (PNG, SVG)")
    parser.add_argument("--json", action="store_true", help="for machines")


def run(arguments: Sequence[str]) -> int:
    """The command; 1 if a check found a problem."""
    if any(argument.startswith("model") for argument in arguments):
        raise RequestError("a whole training run is the matter of: ringattn estimate KEY=VALUE...")
    values, options = parse("plan", KEYS, arguments, _flags)
    if options.plot:
        drawable(options.plot)
    plan = planned(values, values["world"], _TOKENS)
    shape = AttentionShape(
        values["heads"],
        values["kv_heads"] or values["heads"],
        values["head_dim"],
        values["v_dim"],
        ITEMSIZE[values["dtype"]],
        values["batch"],
    )
    report = check(plan) if options.check else None
    facts = _facts(plan, shape)
    if report:
        facts["check"] = {"ok": report.ok, "problems": report.problems}
    if options.plot:
        from ringattn.cli.pictures import draw_plan  # matplotlib only where it is asked for

        draw_plan(plan, shape, options.plot)
    print(json.dumps(facts)) if options.json else _print(plan, facts)
    return 0 if report is None or report.ok else 1


def _facts(plan: Plan, shape: AttentionShape) -> dict:
    ranks = []
    for rank in range(plan.world):
        received, peaks = cost.received(plan, rank, shape), cost.buffers(plan.rank(rank))
        ranks.append(
            {
                "rank": rank,
                "tokens": plan.layout.count(rank),
                "area": plan.area(rank),
                "recv_tokens": plan.recv_tokens(rank),
                "lower_bound_tokens": cost.lower_bound(plan, rank),
                "forward_bytes": received.forward,
                "backward_bytes": received.backward,
                "peak_tokens": peaks.kv,
                "peak_grad_tokens": peaks.grads,
            }
        )
    return {
        "schedule": plan.schedule,
        "ulysses": plan.ulysses,
        "node_size": plan.node_size,
        "layout": plan.layout.name,
        "reason": plan.reason,
        "n_q": plan.mask.n_q,
        "n_k": plan.mask.n_k,
        "slices": len(plan.mask.slices),
        "area": plan.mask.area,
        "imbalance": plan.imbalance,
        "steps": len(plan.steps(0)),
        "shape": asdict(shape),
        "ranks": ranks,
    }


def _short(value: float) -> str:
    """At most four digits and a letter (thousands, millions, ...)."""
    for unit in ("", "k", "M", "G"):
        if value < 10_000:
            return f"{value:.0f}{unit}" if value >= 100 or not unit else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.0f}T"


def _print(plan: Plan, facts: dict) -> None:
    from rich.box import SIMPLE_HEAD  # here: machines ask for --json, and may have no rich
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(str(plan), soft_wrap=True)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    columns = {
        "rank": "rank",
        "tokens": "tokens",
        "area": "pairs",
        "recv_tokens": "rows in",
        "lower_bound_tokens": "needed",
        "forward_bytes": "B fwd",
        "backward_bytes": "B bwd",
        "peak_tokens": "peak K/V",
        "peak_grad_tokens": "peak dK/dV",
    }
    for title in columns.values():
        table.add_column(title, justify="right", no_wrap=True)
    ranks = facts["ranks"]
    if len(ranks) <= _ROWS:
        for rank in ranks:
            table.add_row(*(_short(rank[key]) for key in columns))
        table.add_section()
    for name, summary in (("mean", lambda x: sum(x) / len(x)), ("max", max)):
        cells = (_short(summary([r[key] for r in ranks])) for key in list(columns)[1:])
        table.add_row(name, *cells)
    console.print(table)
    console.print(
        f"steps {facts['steps']}, largest work / mean {facts['imbalance']:.4f}. Rows in: K/V rows "
        "received in the forward; needed: attended and not owned. B: bytes received per layer. "
        "Peak: rows alive beside the rank's own."
    )
    if "check" in facts:
        for problem in facts["check"]["problems"]:
            console.print(f"[red]problem[/red] {problem}", soft_wrap=True)
        if facts["check"]["ok"]:
            console.print(
                "check passed: every pair once, every gradient home, every receive has its send, "
                "all ranks exchange in the same order"
            )
