"""What a step has cost: peak FLOP/s, memory, and the metrics of rank 0."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ringattn.training.observing.loggers import LoggerSettings

EVALUATIONS = "eval.jsonl"
LINES = ("metrics.jsonl", EVALUATIONS, "skipped.jsonl")  # of a run directory; a step each
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of this rank's best of several square matrix products: what MFU divides by."""
    size = 8192 if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(8):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(4):
            a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 4 * 2 * size**3 / best


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: allocated on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def as_json(value: Any) -> str:
    """One line; what is not finite is null, since Python's own NaN is no JSON."""

    def legal(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: legal(each) for key, each in x.items()}
        if isinstance(x, list):
            return [legal(each) for each in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(legal(value))


def append(path: Path, values: dict[str, Any]) -> None:
    """Adds a line to a file of a run directory. Raises OSError, which names it."""
    try:
        with path.open("a") as file:
            file.write(as_json(values) + "\n")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


class MetricsLog:
    """metrics.jsonl and, if asked for, a logger; made on rank 0 only. ``config``: the run's keys as
    plain data."""

    def __init__(
        self, run_dir: Path, logger: LoggerSettings, config: dict[str, Any], resumed_step: int
    ) -> None:
        for path in (run_dir / name for name in LINES):
            if path.exists():
                # Steps after the checkpoint are done again; a line cut short by a kill goes too.
                lines = path.read_text().splitlines()
                kept = [line for line in lines if _step(line) <= resumed_step]
                path.write_text("".join(line + "\n" for line in kept))
        self.path = run_dir / LINES[0]
        self.path.touch()
        self.log = logger.open(run_dir, config)

    def write(self, values: dict[str, Any]) -> None:
        append(self.path, values)
        if self.log:
            self.log.write(values["step"], values)

    def write_evaluation(self, values: dict[str, Any], pictures: dict[str, Path]) -> None:
        """To the logger: loss, perplexity, every probe's mean accuracy, and the pictures."""
        if not self.log:
            return
        accuracies: dict[str, list[float]] = {}
        for cell in values.get("probes", []):
            accuracies.setdefault(cell["task"], []).append(cell["accuracy"])
        line = {f"eval/{key}": values[key] for key in ("loss", "perplexity") if key in values}
        line |= {f"eval/{task}": sum(each) / len(each) for task, each in accuracies.items()}
        self.log.write(values["step"], line)
        self.log.draw(values["step"], {f"eval/{name}_map": file for name, file in pictures.items()})

    def describe(self, facts: dict[str, Any]) -> None:
        """What is known before the first step: plan, forecast, hardware, versions."""
        if self.log:
            self.log.describe(facts)

    def close(self) -> None:
        if self.log:
            self.log.close()


def recorded(path: Path) -> set[float]:
    """The steps that a file of lines has."""
    return {_step(line) for line in path.read_text().splitlines()} if path.exists() else set()


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
