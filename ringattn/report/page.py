"""Runs as a table, as files, and as one page that needs nothing beside itself."""

from __future__ import annotations

import base64
import html
import io
import statistics
from pathlib import Path
from typing import Any

from ringattn.report import pictures
from ringattn.report.read import RunRecord

COLUMNS = ("point", "status", "ranks", "tokens", "tokens/s", "step s", "spread", "predicted s",
           "error", "exposed", "GiB", "predicted GiB", "error GiB", "MFU", "loss")  # fmt: skip
_TITLES = {
    "scaling": "Speed, memory, exposed exchange, efficiency",
    "parts": "Where a step's time goes",
    "predicted": "Predicted against measured",
    "loss": "Loss",
}
# The page asks nobody for anything: a browser would refuse it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# A table wider than the screen scrolls by itself, its first column in sight; pictures are drawn
# for a light ground, and keep it in the dark.
_STYLE = """
:root { --ground: #fff; --ink: #1c1e21; --line: #d8dbe0; --stripe: #f5f6f8 }
@media (prefers-color-scheme: dark) {
  :root { --ground: #16181c; --ink: #e3e5e8; --line: #3a3e45; --stripe: #1f2227 }
}
body { font: 16px/1.5 system-ui, sans-serif; margin: 1.5em auto; max-width: 75em; padding: 0 1em;
  background: var(--ground); color: var(--ink); overflow-wrap: anywhere }
h1, h2 { line-height: 1.2 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
td, th { padding: 4px 8px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line) }
tbody tr:nth-child(odd) td { background: var(--stripe) }
td:first-child, th:first-child { text-align: left; position: sticky; left: 0;
  background: var(--ground); max-width: 40vw; overflow: hidden; text-overflow: ellipsis }
tbody tr:nth-child(odd) td:first-child { background: var(--stripe) }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px }
"""


def rows(runs: list[RunRecord]) -> list[dict[str, str]]:
    """The table, as text; an empty cell is one without a figure."""
    return [_row(run) for run in runs]


def columns(table: list[dict[str, str]]) -> list[str]:
    """Of the table, those with a figure in some row."""
    return [title for title in COLUMNS if any(row[title] for row in table)]


def what_ran(runs: list[RunRecord]) -> str:
    """Model, data and split, in a line: what all runs that wrote their facts have in common."""
    said = [_what_ran(run) for run in runs if run.facts]
    common = said[0] if said else {}
    both = {k: x for k, x in common.items() if x and all(each[k] == x for each in said)}
    return ", ".join(f"{name} {value}" for name, value in both.items())


def titled(runs: list[RunRecord]) -> str:
    """A name for all of them together."""
    paths = [run.path.resolve() for run in runs]
    if len(paths) == 1:
        return paths[0].name
    parents = {path.parent.name for path in paths}
    return f"{len(paths)} runs" + (f" in {parents.pop()}" if len(parents) == 1 else "")


def _what_ran(run: RunRecord) -> dict[str, str | None]:
    config, setup = run.config, run.facts.get("setup") or {}
    plan, data = run.facts.get("plan") or {}, config.get("data") or {}
    kinds = {kind: each.get("mask") for kind, each in (plan.get("kinds") or {}).items()}
    masks = {kind: mask for kind, mask in kinds.items() if isinstance(mask, str)}
    return {
        "parameters": f"{run.facts['parameters']:,}" if run.facts.get("parameters") else None,
        "model": (config.get("model") or {}).get("path"),
        "data": "a mixture" if data.get("mix") else data.get("root") or _unnamed(data),
        "mask": ", ".join(f"{mask} ({kind})" if len(masks) > 1 else mask
                          for kind, mask in masks.items()),
        "sequences over": f"{setup['cp']} of {run.ranks} ranks" if "cp" in setup else None,
        "schedule": plan.get("schedule"),
        "layout": plan.get("layout"),
        "precision": setup.get("precision"),
        "engine": (setup.get("engine") or {}).get("name"),
    }  # fmt: skip


def _unnamed(data: dict[str, Any]) -> str:
    """Data without a folder: a task, or what is trained on where nobody says otherwise."""
    return str(data["format"]) if data.get("format", "auto") != "auto" else "the standard library"


def _row(run: RunRecord) -> dict[str, str]:
    def show(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    memory = run.predicted.get("peak_memory_bytes")
    last = run.metrics[-1] if run.metrics else {}
    values: dict[str, Any] = {
        "point": run.name,
        "status": run.status,
        "ranks": str(run.ranks or ""),
        "tokens": f"{run.seq_len:,}" if run.seq_len else "",
        "tokens/s": show(run.median("tokens_per_s"), ",.0f"),
        "step s": show(run.median("step_s"), ".3g"),
        "spread": show(run.spread("step_s") if run.metrics else None, ".0%"),
        "predicted s": show(run.guess, ".3g"),
        "error": show(run.error(), "+.0%"),
        "exposed": show(pictures.exposed(run), ".1%"),
        "GiB": show(run.peak_memory and run.peak_memory / 2**30, ".2f"),
        "predicted GiB": show(memory and memory / 2**30, ".2f"),
        "error GiB": show(run.memory_error(), "+.0%"),
        "MFU": show(run.median("mfu"), ".1%"),
        "loss": show(last.get("loss"), ".3f"),
    }
    return values


def as_json(runs: list[RunRecord]) -> list[dict[str, Any]]:
    """For machines: what the table says, in seconds and bytes."""
    keys = ("step_s", "tokens_per_s", "mfu", "compute_s", "exchange_s", "engine_s", "data_s")
    return [
        {
            "path": str(run.path),
            "status": run.status,
            "reason": run.reason,
            "varied": run.varied,
            "ranks": run.ranks,
            "seq_len": run.seq_len,
            "measured": {key: run.median(key) for key in keys}
            | {"peak_memory_bytes": run.peak_memory, "spread": run.spread("step_s")},
            "predicted": run.predicted or None,
            "predicted_s": run.guess,
            "error": run.error(),
            "memory_error": run.memory_error(),
        }
        for run in runs
    ]


def summary(runs: list[RunRecord]) -> str:
    """How far predictions were off, in a sentence."""
    errors = [abs(e) for run in runs if (e := run.error()) is not None]
    if not errors:
        return "no predictions: measure this machine with ringattn calibrate, or give hardware="
    memory = [abs(e) for run in runs if (e := run.memory_error()) is not None]
    return (
        f"predicted steps are off by {statistics.median(errors):.0%} (median) and "
        f"{max(errors):.0%} (worst), memory by {statistics.median(memory):.0%} and "
        f"{max(memory):.0%}"
    )


def write(runs: list[RunRecord], folder: Path) -> list[Path]:
    """Pictures as PNG and ``index.html`` in ``folder``; the files, the page first."""
    folder.mkdir(parents=True, exist_ok=True)
    files, images = [], []
    for name, figure in pictures.draw(runs).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=80)
        files.append(folder / f"{name}.png")
        files[-1].write_bytes(buffer.getvalue())
        images.append((_TITLES[name], base64.b64encode(buffer.getvalue()).decode()))
    page = folder / "index.html"
    page.write_text(_html(runs, images))
    return [page, *files]


def _html(runs: list[RunRecord], images: list[tuple[str, str]]) -> str:
    table = rows(runs)
    shown = columns(table)
    head = "".join(f"<th>{html.escape(title)}</th>" for title in shown)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(row[title])}</td>" for title in shown) + "</tr>"
        for row in table
    )
    notes = "".join(
        f"<li>{html.escape(run.name)}: {html.escape(run.status)}, {html.escape(run.reason)}</li>"
        for run in runs
        if run.reason
    )
    known = next((run.facts for run in runs if run.facts), {})
    about = {
        "device": known.get("device"),
        "kernel": known.get("kernel"),
        "hardware": (known.get("hardware") or {}).get("source"),
        **known.get("versions", {}),
    }
    title = titled(runs)
    varied = sorted({key for run in runs for key in run.varied})
    ran = what_ran(runs) + (f"; the points vary {', '.join(varied)}" if varied else "")
    facts = ", ".join(f"{key} {value}" for key, value in about.items() if value)
    notes = notes and f"<ul>{notes}</ul>"
    figures = "".join(
        f'<h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" '
        f'src="data:image/png;base64,{data}">'
        for title, data in images
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}: ringattn report</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p>{html.escape(ran)}</p>
<p>{html.escape(summary(runs))}</p>
<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead>
<tbody>{body}</tbody></table></div>
{notes}
{figures}
<p>Medians over steps, without the first two; spread is (largest - smallest) / median. MFU: 6
FLOPs per matmul parameter and token plus 12 x attended pairs x heads x head_dim per layer, over the
peak of every rank. GiB: allocated memory of a GPU, resident memory of a process without. Exposed:
share of a step in which rank 0 waits for attention's exchanges.</p>
<p>{html.escape(facts)}</p>
</body></html>
"""
