"""Run directories as plain data. Nothing but local files is read."""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

FORMAT = 1  # of facts.json and point.json
_WARM = 2  # first steps, which allocate and compile


class ReportError(ValueError):
    """One line that names the directory and what is wrong with it."""


@dataclass(frozen=True)
class RunRecord:
    """One run. ``status``: finished, memory, failed, interrupted, or running (a directory that no
    sweep has written). ``varied``: what differs between the points of its sweep."""

    path: Path
    status: str
    reason: str
    varied: dict[str, str]
    config: dict[str, Any]
    facts: dict[str, Any]
    metrics: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def seq_len(self) -> int:
        return int(self.config.get("seq_len", 0))

    @property
    def ranks(self) -> int:
        return int(self.facts.get("setup", {}).get("world", 0))

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """Without the first ones, which warm up."""
        return self.metrics[_WARM:] or self.metrics[1:] or self.metrics

    def median(self, key: str) -> float | None:
        values = [step[key] for step in self.steps if step.get(key) is not None]
        return statistics.median(values) if values else None

    def spread(self, key: str) -> float:
        """(Largest - smallest) / median."""
        values = [step[key] for step in self.steps if step.get(key) is not None]
        middle = statistics.median(values) if values else 0
        return (max(values) - min(values)) / middle if middle else 0.0

    @property
    def peak_memory(self) -> float | None:
        peaks = [step["peak_memory_bytes"] for step in self.metrics]
        return max(peaks, default=None)

    @property
    def predicted(self) -> dict[str, Any]:
        return self.facts.get("predicted") or {}

    @cached_property
    def guess(self) -> float | None:
        """Predicted seconds of a step. The prediction is for the first batch; where documents make
        the attended pairs of steps differ, attention's part goes with them."""
        if not self.predicted:
            return None
        parts = self.predicted["parts"]
        attention = parts["attention kernel"] + parts["exposed exchange"]
        first = self.metrics[0]["pairs"] if self.metrics else 0
        share = (self.median("pairs") or 0) / first if first else 1.0
        return self.predicted["seconds"] + (share - 1) * attention

    def error(self) -> float | None:
        """Predicted seconds of a step over measured ones, less 1."""
        measured = self.median("step_s")
        return self.guess / measured - 1 if self.guess and measured else None

    def memory_error(self) -> float | None:
        measured = self.peak_memory
        if not self.predicted or not measured:
            return None
        return self.predicted["peak_memory_bytes"] / measured - 1


def find(paths: list[Path]) -> list[RunRecord]:
    """The runs in ``paths``: run directories, or folders of them such as a sweep's.

    Raises ReportError.
    """
    runs = []
    for path in paths:
        if not path.is_dir():
            raise ReportError(f"{path}: no such directory")
        inside = [path] if _is_run(path) else [p for p in path.iterdir() if _is_run(p)]
        if not inside:
            raise ReportError(
                f"{path}: no run directory, and none in it (metrics.jsonl is missing)"
            )
        runs += [_read(p) for p in sorted(inside, key=_natural)]
    return runs


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """Sorts numbers in names by value."""
    parts = re.split(r"(\d+)", path.name)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def _is_run(path: Path) -> bool:
    return path.is_dir() and any((path / x).exists() for x in ("metrics.jsonl", "point.json"))


def _read(path: Path) -> RunRecord:
    point, facts = _json(path, "point.json"), _json(path, "facts.json")
    metrics = []
    if (path / "metrics.jsonl").exists():
        if not facts:
            raise ReportError(
                f"{path}: no facts.json, so this run is of an earlier version of ringattn; run it "
                "again"
            )
        for number, line in enumerate((path / "metrics.jsonl").read_text().splitlines(), 1):
            try:
                metrics.append(json.loads(line))
            except ValueError:
                raise ReportError(f"{path}/metrics.jsonl: line {number} is no JSON") from None
    config = {}
    if (path / "config.yaml").exists():
        config = yaml.safe_load((path / "config.yaml").read_text())
    status = point.get("status", "running")
    if not point and metrics and metrics[-1]["step"] >= config["train"]["steps"]:
        status = "finished"
    return RunRecord(path, status, point.get("reason", ""), point.get("varied", {}), config, facts,
               metrics)  # fmt: skip


def _json(path: Path, name: str) -> dict[str, Any]:
    file = path / name
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text())
    except ValueError:
        raise ReportError(f"{file}: this is no JSON") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        version = content.get("format") if isinstance(content, dict) else None
        raise ReportError(
            f"{file}: written by another version of ringattn (format {version}; this one reads "
            f"{FORMAT})"
        )
    return content
