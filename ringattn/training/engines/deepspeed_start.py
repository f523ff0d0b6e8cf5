"""DeepSpeed's own start: its communication, and the extension that it builds on a CPU."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch


def start(backend: str, timeout_s: float) -> None:
    """DeepSpeed's communication, in an initialised world."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if backend == "gloo":
        _build_extension()
    import deepspeed  # after its folder is known

    deepspeed.init_distributed(
        dist_backend=backend, verbose=False, timeout=timedelta(seconds=timeout_s)
    )


def _build_extension() -> None:
    """Compiles DeepSpeed's shared-memory extension, one process at a time.

    torch guards a build with a lock file that outlives a killed process, and every later start
    then waits forever. Here the kernel's own lock decides: who holds it knows that a lock file
    in this folder is a leftover. The folder belongs to one environment, so two never rebuild
    each other's. A TORCH_EXTENSIONS_DIR of the user's is left alone.
    """
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    environment = hashlib.sha256(f"{sys.prefix} {torch.__version__}".encode()).hexdigest()[:12]
    folder = cache / "ringattn" / "extensions" / environment
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    # The build calls ninja, which lies beside the Python of an environment that is not activated.
    beside = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([beside, os.environ.get("PATH", os.defpath)])
    with (folder / "building").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        for leftover in folder.glob("*/lock"):
            leftover.unlink()
        from deepspeed.accelerator import get_accelerator

        builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
        if builder is not None and builder.is_compatible():
            builder.load(verbose=False)
