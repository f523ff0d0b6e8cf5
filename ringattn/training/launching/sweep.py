"""Sweeps: ``train.py --multirun``, every point a torchrun job of its own on this machine.

hydra's own sweeper says which points there are; here each is checked before the first one starts,
run unless it has already finished, and its end written down: ``point.json`` in its folder. A point
that fails, or that does not fit into memory, is a result like any other.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
from ringattn.training.launching.limit import FAILURE
from ringattn.typed import SettingsError

POINT, FORMAT = "point.json", 1
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


def launch(points: list[list[str]], composed: DictConfig) -> list[JobReturn]:
    """Runs what has not finished yet, one after the other. Raises SettingsError, before anything
    starts, for a point with a mistake in it, and KeyboardInterrupt once the running job is gone."""
    folder = Path(str(composed.hydra.sweep.dir)).expanduser().absolute()
    GlobalHydra.instance().clear()  # hydra's work is done; each point is composed anew
    jobs = [_prepared(folder, overrides, points) for overrides in points]
    names = [path.name for path, _, _ in jobs]
    if len(set(names)) < len(names):
        raise SettingsError("two points of the sweep are the same")
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        results = _run_all(folder, jobs)
    return [_returned(end) for end in results]


def _run_all(folder: Path, jobs: list[tuple[Path, Point, float | None]]) -> list[Point]:
    print(f"{len(jobs)} points in {folder}", flush=True)
    results = []
    for number, (path, point, limit) in enumerate(jobs, 1):
        before = Point.read(path)
        same = before is not None and before.overrides == point.overrides
        if same and before.status in ENDED:
            end, how = before, "done before: "
        elif point.status == "memory":  # on paper already
            end, how = point, ""
            path.mkdir(exist_ok=True)
            end.write(path)
        else:
            end, how = _run(path, point, limit), ""
        results.append(end)
        outcome = f"{how}{end.status}" + (f": {end.reason}" if end.reason else "")
        print(f"{number}/{len(jobs)} {path.name}: {outcome} ({end.seconds:.0f} s)", flush=True)
    failed = sum(end.status == "failed" for end in results)
    if failed:
        print(f"{failed} failed; log.txt in their folders says why; they run again next time")
    _report(folder, jobs[0][1].overrides)
    return results


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
    folder: Path, overrides: list[str], points: list[list[str]]
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
    run = config.resolved(run, ranks)
    path = folder / re.sub(r"[^\w.+-]", "_", name)
    point = Point("interrupted", own, varied, ranks)
    gpus = run.device != "cpu" and torch.cuda.device_count() >= ranks
    limit = run.memory.limit or (None if gpus else _share(ranks))
    have = limit or torch.cuda.get_device_properties(0).total_memory / 2**30
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


def _run(path: Path, point: Point, limit: float | None) -> Point:
    path.mkdir(parents=True, exist_ok=True)
    (path / FAILURE).unlink(missing_ok=True)
    point.write(path)
    keys = [f'run_dir="{path}"', f"ranks={point.ranks}", f"logger.group={path.parent.name}"]
    keys += [] if limit is None else [f"memory.limit={limit}"]
    begin = time.perf_counter()
    with (path / "log.txt").open("w") as log:
        status = _torchrun(point.ranks, [*point.overrides, *keys], log)
    seconds = round(time.perf_counter() - begin, 1)
    if status == 0:
        end = Point("finished", point.overrides, point.varied, point.ranks, seconds)
    else:
        kind, reason = _failure(path, status)
        end = Point(kind, point.overrides, point.varied, point.ranks, seconds, reason)
    end.write(path)
    return end


def _torchrun(ranks: int, keys: list[str], log: Any) -> int:
    """Its exit status. torchrun has a session of its own: Ctrl-C reaches this process only, which
    then ends the job, so that no rank outlives it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               str(ranks), "-m", "ringattn.training", *keys]  # fmt: skip
    # One thread a rank, also for a world of one: points are compared.
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    job = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )
    try:
        with _interruptible():
            return job.wait()
    finally:
        if job.poll() is None:
            job.terminate()  # torchrun hands it on, and kills what does not end
            try:
                job.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(job.pid, signal.SIGKILL)
                job.wait()


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
    lines = (path / "log.txt").read_text(errors="replace").splitlines()
    if any("Signal 9 (SIGKILL)" in line for line in lines):
        return "memory", "a rank was killed (SIGKILL), as hosts do that run out of memory"
    messages = [line for line in lines if line.startswith("train.py: ")]
    messages += [line for line in lines if re.match(r"\S*(Error|Exception)\b.*: ", line)]
    return "failed", messages[0].removeprefix("train.py: ") if messages else f"exit status {status}"


def _returned(end: Point) -> JobReturn:
    """What hydra expects; a point that failed is no failure of the sweep."""
    result = JobReturn(status=JobStatus.COMPLETED)
    result.return_value = end.status
    return result
