"""What a process may take: memory, an earlier end of it on request, and time to end in."""

from __future__ import annotations

import errno
import json
import os
import resource
from pathlib import Path

import torch
import torch.distributed as dist

FAILURE = "failure.json"  # of a run directory: why it ended, for who started it


def grace_s() -> int | None:
    """Seconds from SIGTERM to SIGKILL under the torchrun that started this process; None without
    one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    try:
        command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode().split("\0")
    except (OSError, ValueError):
        command = []
    text = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")
    for word, following in zip(command, [*command[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == "--shutdown-timeout":
            text = value if equals else following
    try:
        return int(text)
    except ValueError:
        return 30


def set_limit(gib: float | None, device: torch.device) -> None:
    """From here on this process can allocate ``gib`` GiB on its device; None: what there is."""
    if gib is None:
        return
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total), device)
        return
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    now = int(status["VmData"].split()[0]) * 1024  # of which most was reserved, not used
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (now + int(gib * 2**30), hard))


def out_of_memory(error: BaseException) -> bool:
    """Whether this is what Python, torch or CUDA raise where memory ends."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, dist.DistBackendError):  # a network's, whatever it says
        return False
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    messages = (
        "can't allocate memory", "can't start new thread", "Resource temporarily unavailable",
        "Cannot allocate memory", "failed to map segment",
    )  # fmt: skip
    return isinstance(error, RuntimeError | ImportError) and any(m in str(error) for m in messages)


def write_failure(run_dir: Path, kind: str, reason: str) -> None:
    """Leaves the reason in the run directory, if that is still possible."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / FAILURE).write_text(json.dumps({"kind": kind, "reason": reason}) + "\n")
    except OSError:
        pass
