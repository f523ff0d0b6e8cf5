"""``ringattn plan``: a plan as a table, as JSON, proven, or as a picture. Needs no torch."""

from __future__ import annotations

import ast
import json
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Any

from ringattn import cost
from ringattn.cli.request import (
    ITEMSIZE,
    PLAN_KEYS,
    Key,
    RequestError,
    count,
    drawable,
    layout_of,
    mask_of,
    parse,
    plan_of,
    planned,
)
from ringattn.cost import AttentionShape
from ringattn.planning import masks as planning_masks
from ringattn.planning.layer_plans import ONE, LayerPlans
from ringattn.planning.plan import Plan
from ringattn.planning.prove import check
from ringattn.planning.segments import WAYS, Segments
from ringattn.planning.state_exchange import StateExchange, exchange_of
from ringattn.strategy import carried

if TYPE_CHECKING:
    from ringattn.models.mixer_config import Mixer

KEYS = PLAN_KEYS | {
    "world": Key(count, 8, "ranks"),
    "kinds": Key(
        str,
        None,
        'in place of mask: "local: sliding_window(1024); global: causal"; or a mixer, as '
        '"memory: gated_delta" (docs/mixers.md), "routed: moba(block=512, top_k=8)" '
        "(docs/families.md)",
    ),
    "pattern": Key(str, None, "with kinds: that of each layer, as local,local,local,global"),
}
_TOKENS = 2**16  # where neither n nor the mask says how many
_ROWS = 16  # ranks that the table shows one by one
_PROSE = 100  # columns of a sentence


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
    plans, mixers = _planned(values)
    shape = AttentionShape(
        values["heads"],
        values["kv_heads"] or values["heads"],
        values["head_dim"],
        values["v_dim"],
        ITEMSIZE[values["dtype"]],
        values["batch"],
    )
    each, ok = {}, True
    mixers = {kind: _mixer(mixer, shape) for kind, mixer in mixers.items()}
    for kind, segments in plans.segments.items():
        each[kind] = _segment_facts(segments, mixers[kind], shape)
    for kind, plan in plans.items():
        each[kind] = _facts(plan, shape)
        if options.check:
            report = check(plan)
            each[kind]["check"] = {"ok": report.ok, "problems": report.problems}
            ok = ok and report.ok
    if options.plot:
        from ringattn.cli.pictures import draw_plans  # matplotlib only where it is asked for

        received = {
            kind: [rank["forward_bytes"] for rank in each[kind]["ranks"]] for kind in mixers
        }
        exchanges = {}
        for kind, segments in plans.segments.items():
            way = each[kind]["way"] or "direct"
            exchanges[kind] = StateExchange(segments, way)
        draw_plans(plans, shape, options.plot, received, exchanges)
    one = values["kinds"] is None
    if options.json:
        whole = {"kinds": each, "layers": plans.layers, "imbalance": plans.imbalance}
        print(json.dumps(each[ONE] if one else whole))
        return 0 if ok else 1
    for kind, plan in plans.items():
        _print(plan, each[kind], "" if one else f"{plans.counts[kind]} layers of kind {kind}: ")
    for kind, segments in plans.segments.items():
        _print_segments(segments, each[kind], f"{plans.states[kind]} layers of kind {kind}: ")
    if not one and plans:
        of = "attention of all" if plans.segments else "all"
        print(f"{of} {len(plans.layers)} layers: largest work / mean {plans.imbalance:.4f}")
    return 0 if ok else 1


def _planned(values: dict[str, Any]) -> tuple[LayerPlans, dict[str, str]]:
    """The plan, or those of the kinds, and the mixers by kind. Raises RequestError."""
    if values["kinds"] is None:
        if values["pattern"] is not None:
            raise RequestError("pattern needs kinds: the mask of each kind of layer")
        return LayerPlans.alike(planned(values, values["world"], _TOKENS), 1), {}
    from ringattn.models.key_sets import KeySets  # here: masks alone need no pydantic
    from ringattn.models.mixer_config import NAMES

    masks, mixers, sets = {}, {}, {}
    for part in values["kinds"].split(";"):
        name, colon, text = part.partition(":")
        if not colon:
            raise RequestError(f"kinds: {part.strip()!r} is not NAME: MASK")
        if text.strip() in NAMES:
            mixers[name.strip()] = text.strip()
        elif (given := _sets(text.strip())) is not None:
            try:
                sets[name.strip()] = KeySets(**given)
            except ValueError as error:
                reason = "; ".join(
                    ": ".join([*map(str, one["loc"]), one["msg"]]) for one in error.errors()
                )
                raise RequestError(f"kinds: {text.strip()}: {reason}") from None
        else:
            masks[name.strip()] = mask_of(text.strip(), values["n"], _TOKENS)
    usual = ",".join([*masks, *mixers, *sets])
    layers = [name.strip() for name in (values["pattern"] or usual).split(",")]
    if unknown := sorted(set(layers) ^ {*masks, *mixers, *sets}):
        raise RequestError(f"pattern and kinds do not have the same names: {', '.join(unknown)}")
    try:
        attending = [masks[x] for x in layers if x in masks]
        if not attending:  # every token is as much work
            n = mask_of("causal", values["n"], _TOKENS).n_q
            attending = [planning_masks.sliding_window(n, 1)]
        layout = layout_of(values["layout"], attending, values["world"], values["chunk"])
        # Documents: what no layer attends across.
        lengths = reduce(or_, masks.values()).pieces if masks else [layout.n]
        along = dict.fromkeys([*mixers, *sets], lengths)
        kv_heads = values["kv_heads"] or values["heads"]
        segments, of_sets = carried(along, layout, sets, lambda _: values["ulysses"] or 1, kv_heads)
    except (ValueError, OverflowError, MemoryError) as error:
        raise RequestError(str(error)) from None
    plans = {kind: plan_of(values, mask, layout, None) for kind, mask in masks.items()}
    return LayerPlans(plans, layers, segments=segments, sets=of_sets), mixers


def _sets(text: str) -> dict[str, Any] | None:
    """The keys of attention to sets of keys, "moba(block=512, top_k=8)"; None if it is none."""
    from ringattn.models.key_sets import NAMES

    name = text.partition("(")[0].strip()
    if name not in NAMES:
        return None
    try:
        call = ast.parse(text if "(" in text else f"{name}()", mode="eval").body
        if not isinstance(call, ast.Call):
            raise ValueError
        keys = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
        if call.args or None in keys:
            raise ValueError
    except (SyntaxError, ValueError):
        raise RequestError(f"kinds: {text!r} is not NAME(KEY=VALUE, ...)") from None
    return keys | {"mixer": name}


def _mixer(name: str, shape: AttentionShape) -> Mixer:
    """With the sizes of the attention beside it."""
    from ringattn.models.mixer_config import Mixer

    return Mixer(mixer=name, heads=shape.heads, key_dim=shape.head_dim, value_dim=shape.values)


def _segment_facts(segments: Segments, mixer: Mixer, shape: AttentionShape) -> dict:
    ranks = []
    for rank in range(segments.world):
        received = cost.received_states(segments, rank, mixer, shape.itemsize, shape.batch)
        ranks.append(
            {
                "rank": rank,
                "tokens": segments.layout.count(rank),
                "segments": len(segments.of(rank)),
                "halo_tokens": sum(segments.halo(rank, mixer.conv - 1).recvs.values()),
                "forward_bytes": received.forward,
                "backward_bytes": received.backward,
            }
        )
    ways, chosen, steps = {}, None, 0
    if sizes := mixer.state_bytes(shape.itemsize):
        sizes = sizes.times(shape.batch)
        exchange = exchange_of(segments, sizes)
        chosen, steps = exchange.way, exchange.forward.steps
        for way in WAYS:
            most, exchanges = StateExchange(segments, way).most(sizes)
            ways[way] = {"bytes": most, "exchanges": exchanges}
    return {
        "mixer": asdict(mixer),
        "layout": segments.layout.name,
        "documents": len(segments.lengths),
        "segments": len(segments.all),
        "way": chosen,
        "steps": steps,
        "ways": ways,
        "ranks": ranks,
    }


def _print_segments(segments: Segments, facts: dict, title: str) -> None:
    from ringattn.cli.tables import wide_console

    console, ranks = wide_console(), facts["ranks"]
    console.print(f"{title}{facts['mixer']['mixer']}; {segments}", soft_wrap=True)
    most = {key: max(rank[key] for rank in ranks) for key in list(ranks[0])[3:]}
    console.print(
        f"a rank receives at most {_short(most['forward_bytes'])} B forward "
        f"({most['halo_tokens']} halo tokens among them) and "
        f"{_short(most['backward_bytes'])} B backward",
        soft_wrap=True,
    )
    if facts["ways"]:
        each = (
            f"{way} {_short(cost['bytes'])} B in {cost['exchanges']} exchanges"
            for way, cost in facts["ways"].items()
        )
        console.print(
            f"states {facts['way']}; ways, forward and backward: {'; '.join(each)}", soft_wrap=True
        )


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


def _print(plan: Plan, facts: dict, title: str = "") -> None:
    from rich.box import SIMPLE_HEAD  # here: machines ask for --json, and may have no rich
    from rich.table import Table

    from ringattn.cli.tables import wide_console

    console = wide_console()
    console.print(title + str(plan), soft_wrap=True)
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
        "Peak: rows alive beside the rank's own.",
        width=_PROSE,
    )
    if "check" in facts:
        for problem in facts["check"]["problems"]:
            console.print(f"[red]problem[/red] {problem}", soft_wrap=True)
        if facts["check"]["ok"]:
            console.print(
                "check passed: every pair once, every gradient home, every receive has its send, "
                "all ranks exchange in the same order",
                width=_PROSE,
            )
