"""Whether a process lives that has left something on a disk."""

from __future__ import annotations

import ctypes
import hashlib
import os
import secrets
import signal
from pathlib import Path


def place() -> str:
    """Where process ids mean the same: this boot of this machine, and its container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return hashlib.sha256(f"{boot} {os.readlink('/proc/self/ns/pid')}".encode()).hexdigest()[:8]
    except OSError:
        return secrets.token_hex(4)  # nowhere else is the same


def started(pid: object) -> str | None:
    """When a process of this place began; None if it is gone. An id may be another's later."""
    try:
        after_name = Path(f"/proc/{int(pid)}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, TypeError, ValueError, IndexError):
        return None
    return None if after_name[0] in "ZX" else after_name[19]


def alive(pid: object, since: object) -> bool:
    """Whether the process of this place is there that began then."""
    begin = started(pid)
    return begin is not None and begin == since


def draft(path: Path) -> Path:
    """A name beside ``path`` for what this process has not finished yet."""
    return path.with_name(f"{path.name}.{place()}.{os.getpid()}.{started(os.getpid())}.partial")


def abandoned(folder: Path, name: str = "*") -> list[Path]:
    """Drafts of ``name`` in the folder whose processes are gone; of other machines nobody knows."""
    found = []
    for path in folder.glob(f"{name}.partial"):
        *_, where, pid, since, _ = ["", "", "", *path.name.split(".")]
        if where == place() and not alive(pid, since):
            found.append(path)
    return found


def end_with_parent() -> None:
    """From here on this process is asked to stop, by SIGTERM, when its parent is gone: the kernel
    says so (Linux; elsewhere nothing happens). For a rank, whose torchrun may be killed: what
    started the run anew would otherwise meet it."""
    parent = os.getppid()
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is None:
        return
    set_parent_death_signal = 1
    prctl(set_parent_death_signal, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # in between
        os.kill(os.getpid(), signal.SIGTERM)
