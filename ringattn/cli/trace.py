"""A predicted step as a trace that Perfetto and chrome://tracing open."""

from __future__ import annotations

import json
from pathlib import Path

from ringattn import cost
from ringattn.cost.step import Prediction, ranks_of, timeline_of

_RANKS = 16  # that a trace shows at most
_TRACKS = {"compute": 1, "exchange": 2, "gradients": 3, "wait": 4}


def write(best: Prediction, path: Path) -> None:
    """One process per rank: the parts of its step, and the steps of one layer's plan (of the kind
    with most pairs, if any layer attends), forward and backward, on tracks of their own. Times are
    microseconds."""
    setup, hardware, plan = best.setup, best.hardware, best.plans.heaviest
    ranks = list(range(setup.cp))
    if setup.cp > _RANKS:
        ranks = cost.sample(plan) if plan else ranks_of(best.plans)
    spans, forward = (), 0.0
    if plan:
        line = timeline_of(best.model, setup, plan, hardware, ranks, spans=True)
        spans, forward = line.spans, line.forward
    events = []
    for rank in ranks:
        events.append(_name("process_name", rank, 0, f"rank {rank}"))
        events.append(_name("thread_name", rank, 0, "parts of a step"))
        for kind, track in _TRACKS.items():
            events.append(_name("thread_name", rank, track, f"one layer's attention: {kind}"))
        at = 0.0
        for part, seconds in best.parts.items():
            if seconds > 0:
                events.append(_event(rank, 0, part, at, seconds))
                at += seconds
    for span in spans:
        offset = forward if span.of == "backward" else 0.0
        name = f"{span.of}, {span.label}"
        begin = span.begin + offset
        events.append(_event(span.rank, _TRACKS[span.kind], name, begin, span.end - span.begin))
    about = {
        "split": str(plan or best.plans.layout),
        "hardware": hardware.name,
        "step_s": best.seconds,
    }
    path.write_text(json.dumps({"traceEvents": events, "otherData": about}))


def _name(kind: str, rank: int, track: int, name: str) -> dict:
    return {"ph": "M", "name": kind, "pid": rank, "tid": track, "args": {"name": name}}


def _event(rank: int, track: int, name: str, begin: float, seconds: float) -> dict:
    return {"ph": "X", "name": name, "pid": rank, "tid": track, "ts": 1e6 * begin,
            "dur": 1e6 * seconds}  # fmt: skip
