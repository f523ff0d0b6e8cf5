"""Sweeps: ``train.py --multirun``, every point a torchrun job of its own, on this machine one after
the other, under Slurm all at once.

hydra's own sweeper says which points there are; here each is checked before the first one starts,
run unless it has already finished, and its end written down: ``point.json`` in its folder. A point
that fails, or that does not fit into memory, is a result like any other.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from hydra_plugins.ringattn_launcher import TorchrunLauncher
from ringattn.refusal import refuse
from ringattn.training import config
from ringattn.training.forecast import on_paper
from ringattn.training.launching.jobs import Slurm, torchrun
from ringattn.training.launching.limit import FAILURE
from ringattn.typed import SettingsError

POINT, LOG, FORMAT = "point.json", "log.txt", 1
ENDED = ("finished", "memory")  # what is not run again
INTERRUPTED = 130
_HOPELESS = 2.0  # times the memory that there is: not worth trying
_RANKS = 2  # of a point that does not say


@dataclass(frozen=True)
class Point:
    """One job of a sweep. ``status``: finished, memory (it did not fit), failed or interrupted;
    ``overrides``: its command line; ``varied``: the part of it that differs between points."""

    status: str
    overrides: list[str]
    varied: dict[str, str]
    ranks: int
    seconds: float = 0.0
    reason: str = ""
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        (folder / POINT).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Point | None:
        """None where there is none, or not of this version."""
        try:
            content = json.loads((folder / POINT).read_text())
            known = {field.name for field in fields(cls)}
            return cls(**content) if content["format"] == FORMAT and set(content) <= known else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def main(arguments: list[str]) -> int:
    """``train.py --multirun``: hydra makes the points and hands them to :func:`launch`."""
    sys.argv = [sys.argv[0], *map(config.quoted, arguments)]
    config.register()
    # hydra looks for plugins in files, which editable installations hide from it.
    Plugins.instance().register(TorchrunLauncher)

    @hydra.main(config_path="pkg://ringattn.configs", config_name="config", version_base="1.3")
    def task(composed: DictConfig) -> None:
        raise SettingsError("hydra/launcher must be torchrun")

    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that what launch raises comes out as it is
    try:
        task()
    except (SettingsError, HydraException, OmegaConfBaseException) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return refuse(f"train.py: {' '.join(lines)}")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one ended", file=sys.stderr)
        return INTERRUPTED
    return 0


def launch(
    points: list[list[str]], composed: DictConfig, cluster: Slurm | None = None
) -> list[JobReturn]:
    """Runs what has not finished yet: on this machine one after the other, on a ``cluster`` all at
    once. Raises SettingsError, before anything starts, for a point with a mistake in it, and
    KeyboardInterrupt once the running jobs are gone."""
    folder = Path(str(composed.hydra.sweep.dir)).expanduser().absolute()
    GlobalHydra.instance().clear()  # hydra's work is done; each point is composed anew
    jobs = [_prepared(folder, overrides, points, cluster) for overrides in points]
    names = [path.name for path, _, _ in jobs]
    if len(set(names)) < len(names):
        raise SettingsError("two points of the sweep are the same")
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        results = _run_all(folder, jobs, cluster)
    return [_returned(end) for end in results]


def _run_all(
    folder: Path, jobs: list[tuple[Path, Point, float | None]], cluster: Slurm | None
) -> list[Point]:
    print(f"{len(jobs)} points in {folder}", flush=True)
    results = []
    with ExitStack() as running, _interruptible():
        ends = [_end(*job, cluster, running) for job in jobs] if cluster else None
        for number, job in enumerate(jobs, 1):
            end, how = (ends[number - 1] if ends else _end(*job, cluster, running))()
            results.append(end)
            outcome = f"{how}{end.status}" + (f": {end.reason}" if end.reason else "")
            name = job[0].name
            print(f"{number}/{len(jobs)} {name}: {outcome} ({end.seconds:.0f} s)", flush=True)
    failed = sum(end.status == "failed" for end in results)
    if failed:
        print(f"{failed} failed; log.txt in their folders says why; they run again next time")
    _report(folder, jobs[0][1].overrides)
    return results


def _end(
    path: Path, point: Point, limit: float | None, cluster: Slurm | None, running: ExitStack
) -> Callable[[], tuple[Point, str]]:
    """Starts the point if it has to be run; what is returned waits, and says how it ended."""
    before = Point.read(path)
    same = before is not None and before.overrides == point.overrides
    if same and before.status in ENDED:
        return lambda: (before, "done before: ")
    if point.status == "memory":  # on paper already
        path.mkdir(exist_ok=True)
        point.write(path)
        return lambda: (point, "")
    wait = _start(path, point, limit, cluster, running)
    return lambda: (wait(), "")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two sweeps at work would spoil each other's measurements. The lock goes with its process."""
    with (folder / "lock").open("w") as guard:
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(f"another sweep is at work in {folder}") from None
        yield


def _report(folder: Path, overrides: list[str]) -> None:
    """The page of the sweep; its pictures go to wandb too, as a run of the sweep's group."""
    from ringattn.report import page
    from ringattn.report.read import find

    runs = find([folder])
    files = page.write(runs, folder / "report")
    print(f"{page.summary(runs)}\npage and pictures: {files[0]}", flush=True)
    logger = config.load(overrides).logger
    log = replace(logger, group=folder.name).open(files[0].parent, {})
    if log:
        rows = page.rows(runs)
        log.draw(0, {file.stem: file for file in files[1:]})
        data = [[row[title] for title in page.COLUMNS] for row in rows]
        log.table("points", list(page.COLUMNS), data)
        log.close()


def _prepared(
    folder: Path, overrides: list[str], points: list[list[str]], cluster: Slurm | None
) -> tuple[Path, Point, float | None]:
    """(folder, point before it has run, GiB that a rank may hold) of one point."""
    own = [o for o in overrides if not o.startswith("hydra")]
    varied = {}
    for override in own:
        key, _, value = override.partition("=")
        if not all(override in other for other in points):
            varied[key.lstrip("+")] = value
    # Nothing that hydra's grammar or a shell would want quoted.
    name = "_".join(f"{key}-{value}" for key, value in varied.items()) or "point"
    run = config.load(own)
    ranks = run.ranks or _RANKS
    run = config.resolved(run, ranks, ranks // cluster.nodes(ranks) if cluster else None)
    path = folder / re.sub(r"[^\w.+-]", "_", name)
    point = Point("interrupted", own, varied, ranks)
    gpus = run.device != "cpu" and torch.cuda.device_count() >= ranks
    limit = run.memory.limit or (None if gpus or cluster else _share(ranks))
    have = limit or (
        torch.cuda.get_device_properties(0).total_memory / 2**30 if gpus and not cluster
        else math.inf  # other machines: nobody knows
    )  # fmt: skip
    try:
        need = on_paper(run, ranks).memory.device / 2**30
    except ValueError as error:
        raise SettingsError(f"{name}: {error}") from None
    if need > _HOPELESS * have:
        reason = f"needs {need:,.0f} GiB on paper, a rank has {have:,.1f}; not tried"
        point = replace(point, status="memory", reason=reason)
    return path, point, limit


def _share(ranks: int) -> float:
    """GiB of this machine's free memory for each rank, so that a point which does not fit ends by
    itself and nothing else with it."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    free = next(int(line[1]) for line in lines if line[0] == "MemAvailable:")
    return round(0.9 * free / 2**20 / ranks, 1)


def _start(
    path: Path, point: Point, limit: float | None, cluster: Slurm | None, running: ExitStack
) -> Callable[[], Point]:
    path.mkdir(parents=True, exist_ok=True)
    (path / FAILURE).unlink(missing_ok=True)
    point.write(path)
    keys = [f'run_dir="{path}"', f"ranks={point.ranks}", f"logger.group={path.parent.name}"]
    keys += [] if limit is None else [f"memory.limit={limit}"]
    begin = time.perf_counter()
    job = cluster.job if cluster else torchrun
    process = running.enter_context(job(point.ranks, [*point.overrides, *keys], path / LOG))

    def wait() -> Point:
        status = process.wait()
        seconds = round(time.perf_counter() - begin, 1)
        kind, reason = ("finished", "") if status == 0 else _failure(path, status)
        end = Point(kind, point.overrides, point.varied, point.ranks, seconds, reason)
        end.write(path)
        return end

    return wait


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM interrupts like Ctrl-C."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _failure(path: Path, status: int) -> tuple[str, str]:
    """(status of the point, why): as the run has said, or as its log tells."""
    try:
        failure = json.loads((path / FAILURE).read_text())
        return str(failure["kind"]), str(failure["reason"])
    except (OSError, ValueError, KeyError):
        pass
    lines = (path / LOG).read_text(errors="replace").splitlines()
    if any("Signal 9 (SIGKILL)" in line for line in lines):
        return "memory", "a rank was killed (SIGKILL), as hosts do that run out of memory"
    messages = [line for line in lines if line.startswith(("train.py: ", "sbatch: "))]
    messages += [line for line in lines if re.match(r"\S*(Error|Exception)\b.*: ", line)]
    return "failed", messages[0].removeprefix("train.py: ") if messages else f"exit status {status}"


def _returned(end: Point) -> JobReturn:
    """What hydra expects; a point that failed is no failure of the sweep."""
    result = JobReturn(status=JobStatus.COMPLETED)
    result.return_value = end.status
    return result
