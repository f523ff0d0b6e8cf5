"""``ringattn report RUNS...``: a table, pictures and one page from run directories."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

from ringattn.cli.request import RequestError
from ringattn.report.read import ReportError, find


def run(arguments: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="ringattn report",
        usage="ringattn report RUNS... [--out FOLDER] [--json]",
        exit_on_error=False,
    )
    parser.add_argument("runs", nargs="*", type=Path, help="run directories, or folders of them")
    parser.add_argument("--out", type=Path, help="where to write; by default RUNS/report")
    parser.add_argument("--json", action="store_true", help="for machines; writes nothing")
    try:
        options, unknown = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise RequestError(str(error)) from None
    if unknown:
        raise RequestError(f"unknown flag {unknown[0]}; --help lists them")
    if not options.runs:
        raise RequestError("give run directories, or a folder of them")
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError("pictures need matplotlib: pip install matplotlib")
    from ringattn.report import page

    try:
        runs = find(options.runs)
    except (ReportError, OSError) as error:
        raise RequestError(str(error)) from None
    if options.json:
        print(json.dumps(page.as_json(runs)))
        return 0
    folder = options.out or options.runs[0] / "report"
    try:
        files = page.write(runs, folder)
    except OSError as error:
        raise RequestError(f"--out {folder}: {error.strerror}") from None
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from ringattn.cli.tables import wide_console

    console, table = wide_console(), Table(box=SIMPLE_HEAD, padding=(0, 1))
    rows = page.rows(runs)
    shown = page.columns(rows)
    for title in shown:
        table.add_column(title, justify="left" if title in ("point", "status") else "right")
    for row in rows:
        table.add_row(*(row[title] for title in shown))
    console.print(page.what_ran(runs), soft_wrap=True, markup=False)
    console.print(table)
    for each in runs:
        if each.reason:
            console.print(f"{each.name}: {each.reason}", soft_wrap=True, markup=False)
    console.print(page.summary(runs))
    console.print(f"page and pictures: {files[0]}", soft_wrap=True)
    return 0
