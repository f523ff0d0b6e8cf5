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
import subprocess
import sys
import time
from collections.abc import Iterator
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
_POLL_S = 0.1


@dataclass(frozen=True)
class Point:
    """One job of a sweep. ``status``: finished, memory (it did not fit), failed or interrupted;
    ``overrides``: its command line; ``varied``: what of it differs between points; ``job``: its
    number in a cluster's queue."""

    status: str
    overrides: list[str]
    varied: dict[str, str]
    ranks: int
    seconds: float = 0.0
    reason: str = ""
    job: str = ""
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
        for path, _, _ in jobs if cluster else ():
            before = Point.read(path)
            if before and before.status not in ENDED and before.job and cluster.queued(before.job):
                raise SettingsError(
                    f"{path.name}: its job {before.job} is still in the queue, of a sweep that has "
                    f"ended without it; wait for it, or scancel {before.job}"
                )
        results = _run_all(folder, jobs, cluster)
    return [_returned(end) for end in results]


@dataclass
class _Started:
    """A point at work. ``seconds`` are counted from here, so in a queue too."""

    number: int
    path: Path
    point: Point
    process: subprocess.Popen
    begin: float

    def end(self, cluster: bool) -> Point:
        """Of a process that has ended; written down."""
        status, seconds = self.process.returncode, round(time.perf_counter() - self.begin, 1)
        kind, reason = ("finished", "") if status == 0 else _failure(self.path, status, cluster)
        end = replace(self.point, status=kind, seconds=seconds, reason=reason)
        end.write(self.path)
        return end


def _run_all(
    folder: Path, jobs: list[tuple[Path, Point, float | None]], cluster: Slurm | None
) -> list[Point]:
    print(f"{len(jobs)} points in {folder}", flush=True)
    waiting, running = list(enumerate(jobs, 1)), []
    results: dict[int, Point] = {}

    def done(number: int, path: Path, end: Point, how: str = "") -> None:
        results[number] = end
        outcome = f"{how}{end.status}" + (f": {end.reason}" if end.reason else "")
        print(f"{number}/{len(jobs)} {path.name}: {outcome} ({end.seconds:.0f} s)", flush=True)

    def collect() -> None:
        for each in [each for each in running if each.process.poll() is not None]:
            running.remove(each)
            done(each.number, each.path, each.end(cluster is not None))

    with _interruptible(), ExitStack() as alive:
        try:
            while waiting or running:
                while waiting and (cluster or not running):
                    number, (path, point, limit) = waiting.pop(0)
                    before = Point.read(path)
                    same = before is not None and before.overrides == point.overrides
                    if same and before.status in ENDED:
                        done(number, path, before, "done before: ")
                    elif point.status == "memory":  # on paper already
                        path.mkdir(exist_ok=True)
                        point.write(path)
                        done(number, path, point)
                    else:
                        running.append(_start(number, path, point, limit, cluster, alive))
                time.sleep(_POLL_S)
                collect()
        finally:
            collect()  # interrupted: what has ended all the same
    ends = [results[number] for number in sorted(results)]
    failed = sum(end.status == "failed" for end in ends)
    if failed:
        print(f"{failed} failed; log.txt in their folders says why; they run again next time")
    _report(folder, jobs[0][1].overrides)
    return ends


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
    number: int,
    path: Path,
    point: Point,
    limit: float | None,
    cluster: Slurm | None,
    alive: ExitStack,
) -> _Started:
    path.mkdir(parents=True, exist_ok=True)
    (path / FAILURE).unlink(missing_ok=True)
    point.write(path)
    keys = [f'run_dir="{path}"', f"ranks={point.ranks}", f"logger.group={path.parent.name}"]
    keys += [] if limit is None else [f"memory.limit={limit}"]
    begin = time.perf_counter()
    launch = cluster.job if cluster else torchrun
    job = alive.enter_context(launch(point.ranks, [*point.overrides, *keys], path / LOG))
    if job.number:
        point = replace(point, job=job.number)
        point.write(path)
    return _Started(number, path, point, job.process, begin)


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


def _failure(path: Path, status: int, cluster: bool) -> tuple[str, str]:
    """(status of the point, why): as the run has said, or as its log tells; on a cluster that is of
    all attempts, so that a kill in it may have been survived."""
    try:
        failure = json.loads((path / FAILURE).read_text())
        return str(failure["kind"]), str(failure["reason"])
    except (OSError, ValueError, KeyError):
        pass
    lines = (path / LOG).read_text(errors="replace").splitlines()
    if not cluster and any("Signal 9 (SIGKILL)" in line for line in lines):
        return "memory", "a rank was killed (SIGKILL), as hosts do that run out of memory"
    messages = [line for line in lines if line.startswith(("train.py: ", "sbatch: "))]
    messages += [line for line in lines if re.match(r"\S*(Error|Exception)\b.*: ", line)]
    return "failed", messages[0].removeprefix("train.py: ") if messages else f"exit status {status}"


def _returned(end: Point) -> JobReturn:
    """What hydra expects; a point that failed is no failure of the sweep."""
    result = JobReturn(status=JobStatus.COMPLETED)
    result.return_value = end.status
    return result
