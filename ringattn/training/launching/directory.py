"""The directory of a run: its name, who started the run, and that only one lives in it."""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from ringattn import living

LAUNCH = "launch"  # the file that says who started the run
LOCK = "lock"  # the file that is there while it lives
TAKING = ".taking"  # the file that is there while a dead run's lock is replaced
PERIOD_S = 5.0  # in which a living run writes its lock anew


class InUse(RuntimeError):
    """Another run lives in the directory."""


def named(run_dir: str | None) -> Path:
    """``run_dir``; where it is not given, a new one, or after a restart by torchrun the one that
    this launch began with."""
    if run_dir is not None:
        return Path(run_dir).expanduser().absolute()
    runs = Path("runs").absolute()
    for path in sorted(runs.glob(f"*/{LAUNCH}"), reverse=True):
        if begun(path.parent):
            return path.parent
    return runs / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"


def begun(run_dir: Path) -> bool:
    """Whether a checkpoint is there that an earlier start of this launch has written. (torchrun's
    count of restarts does not tell: it leaves out those that other machines asked for.)"""
    path = run_dir / LAUNCH
    if "TORCHELASTIC_RUN_ID" not in os.environ or not path.is_file():
        return False
    finished = any(run_dir.glob("checkpoints/step_*/ringattn.json"))
    return finished and path.read_text() == launch()


def launch() -> str:
    """Stands for one launch on this machine: its torchrun, however often that restarts us."""
    names = (os.environ.get("TORCHELASTIC_RUN_ID", ""), socket.gethostname(), str(os.getppid()))
    return " ".join(names)


def create(run_dir: Path, exclusive: bool) -> Path:
    """Makes the directory; if ``exclusive``, under another name where somebody has just made it.
    Raises OSError."""
    if not exclusive:
        run_dir.mkdir(parents=True, exist_ok=True)
        return run_dir
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, 1000):
        path = run_dir if number == 1 else run_dir.with_name(f"{run_dir.name}-{number}")
        with suppress(FileExistsError):
            path.mkdir()
            return path
    raise FileExistsError(f"{run_dir} and 999 more are there")


def holder(run_dir: Path, listen: bool = True) -> str | None:
    """Who lives in the directory; None if nobody does, or if only listening could tell and is not
    wanted.

    On this machine the process that its lock names tells. Of another machine the lock has to be
    written anew for some periods, which takes so long; no file system's own locks are needed.
    """
    record = _read(run_dir / LOCK)
    return _living(run_dir, record, listen) if record is not None else None


def _living(run_dir: Path, record: dict[str, Any], listen: bool = True) -> str | None:
    who = f"process {record.get('pid')} on {record.get('host')}, since {record.get('since')}"
    if record.get("place") == living.place():
        return who if _alive(record) else None
    until = time.monotonic() + 3 * PERIOD_S * listen
    while time.monotonic() < until:
        time.sleep(PERIOD_S / 5)
        now = _read(run_dir / LOCK)
        if now is None:
            return None
        if now != record:
            return who
    return None


def shared(run_dir: Path, token: str, patience_s: float = 10.0) -> bool:
    """Whether this process sees the lock that another has just made, of that token; file systems
    over a network show it some seconds later."""
    until = time.monotonic() + patience_s
    while (_read(run_dir / LOCK) or {}).get("token") != token:
        if time.monotonic() > until:
            return False
        with suppress(OSError):
            os.listdir(run_dir)  # some show new names to those that ask for all
        time.sleep(0.1)
    return True


class Lock:
    """Holds ``run_dir``; use as a context manager. Raises InUse, and OSError."""

    def __init__(self, run_dir: Path) -> None:
        self.path, self.token = run_dir / LOCK, secrets.token_hex(8)
        self._draft = run_dir / f".lock-{self.token}"
        self._record: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "place": living.place(),
            "started": living.started(os.getpid()),
            "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
            "token": self.token,
        }
        self._waits_since = 0.0  # for another that replaces the lock
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lock", daemon=True)

    def __enter__(self) -> Lock:
        while not self._taken():
            record = _read(self.path)
            if record is None:
                continue
            if who := _living(self.path.parent, record):
                raise InUse(
                    f"{self.path.parent} is in use by another run ({who}); give another run_dir, "
                    "or end that run"
                )
            if self._replaced(record):
                break
        for left in self.path.parent.glob(".lock-*"):  # by those that were killed
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > 60:
                    left.unlink()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        if (_read(self.path) or {}).get("token") == self.token:
            self.path.unlink(missing_ok=True)
        with suppress(OSError):
            self.path.parent.rmdir()  # if nothing was written

    def _taken(self) -> bool:
        """Puts the lock there, where none is."""
        return _put(self.path, self._record | {"beat": 0}, self._draft)

    def _replaced(self, dead: dict[str, Any]) -> bool:
        """Puts the lock in the place of one that nobody holds. Of several that want to, one may at
        a time; it looks first whether the dead one is still there."""
        guard = self.path.with_name(TAKING)
        if not _put(guard, self._record, self._draft):
            before = _read(guard) or {}
            self._waits_since = self._waits_since or time.monotonic()
            if time.monotonic() - self._waits_since > 3 * PERIOD_S or (
                before.get("place") == living.place() and not _alive(before)
            ):
                guard.unlink(missing_ok=True)  # it died there
            time.sleep(0.02)
            return False
        try:
            if _read(self.path) != dead:
                return False
            self._draft.write_text(json.dumps(self._record | {"beat": 0}))
            self._draft.replace(self.path)
            return True
        finally:
            guard.unlink(missing_ok=True)

    def _run(self) -> None:
        beat = 0
        while not self._stop.wait(PERIOD_S):
            beat += 1
            now = _read(self.path)
            if now is not None and now.get("token") != self.token:
                print(
                    f"train.py: {self.path.parent}: another run has taken it ({now.get('host')}, "
                    f"process {now.get('pid')}) while this one was not heard of; this one ends",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
                os._exit(1)
            with suppress(OSError):  # a full disk, or no directory any more: saving will tell
                self._draft.write_text(json.dumps(self._record | {"beat": beat}))
                if now is not None:
                    self._draft.replace(self.path)
            with suppress(OSError):
                self._draft.unlink(missing_ok=True)


def _put(path: Path, record: dict[str, Any], draft: Path) -> bool:
    """Makes a file, whole and only where none is."""
    draft.write_text(json.dumps(record))
    try:
        os.link(draft, path)
        return True
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        try:
            with path.open("x") as file:
                file.write(json.dumps(record))
            return True
        except FileExistsError:
            return False
    finally:
        draft.unlink(missing_ok=True)


def _alive(record: dict[str, Any]) -> bool:
    return living.alive(record.get("pid"), record.get("started"))


def _read(path: Path) -> dict[str, Any] | None:
    """None if there is no file; what cannot be read changes with its content, or its time."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:  # another user's: not nobody's
        try:
            return {"content": f"{error.strerror} {path.stat().st_mtime_ns}"}
        except OSError:
            return None
    try:
        record = json.loads(content)
        return record if isinstance(record, dict) else {"content": repr(record)}
    except ValueError:
        return {"content": repr(content)}
