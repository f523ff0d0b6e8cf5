"""The way in: command line to exit status. One process of a torchrun world."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator, Sized
from contextlib import ExitStack, contextmanager
from typing import Any

from ringattn import living
from ringattn.refusal import advice, refuse

FAILED = 1
OUT_OF_MEMORY = 3
UNFINISHED = 75  # sysexits' EX_TEMPFAIL: to be started again


def main(arguments: list[str]) -> int:
    """Runs train.py's command line; returns the exit status.

    Bad input is one line of each machine and status 2, before any group or model is made.
    """
    try:
        return _main(arguments)
    except ModuleNotFoundError as error:
        if not (line := advice(error.name)):
            raise
        return refuse(f"train.py: {line}")


def _main(arguments: list[str]) -> int:
    from ringattn.training import config  # here: hydra is an extra
    from ringattn.training.launching import directory
    from ringattn.training.run import with_keys

    if any(a in ("--multirun", "-m") for a in arguments):
        from ringattn.training.launching.sweep import main as sweep

        return sweep(arguments)
    for name, value in (
        ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("MASTER_ADDR", "127.0.0.1"),
    ):  # fmt: skip
        os.environ.setdefault(name, str(value))  # plain `python train.py` is a world of one
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if "TORCHELASTIC_RUN_ID" in os.environ:
        living.end_with_parent()
    try:
        overrides = [a for a in arguments if a not in ("-h", "--help")]
        if len(overrides) < len(arguments):
            if rank == 0:
                print(config.help_text(config.composed(overrides)))
            return 0
        run = config.resolved(config.load(overrides), world)
        with config.path_errors("run_dir", run.run_dir):
            run_dir = directory.named(run.run_dir)
            config.writable(run_dir)
        if rank == 0 and (who := directory.holder(run_dir, listen=False)):
            raise ValueError(f"run_dir={run_dir} is in use by another run: {who}")
        if directory.begun(run_dir):  # by this launch, which torchrun has restarted: it goes on
            run = with_keys(run, checkpoint={"resume": "auto"})
        # Only now torch: a mistyped key costs no second.
        from ringattn.data.documents import DataError
        from ringattn.execution.carriers import end_distributed
        from ringattn.kernels import select
        from ringattn.training import loop
        from ringattn.training.checkpoints.saver import Damaged, SaveFailed
        from ringattn.training.checkpoints.states import NotFinite
        from ringattn.training.job import prepare
        from ringattn.training.launching.limit import out_of_memory, set_limit, write_failure
        from ringattn.training.launching.world import pick_device, start_distributed
        from ringattn.training.observing.metrics import DTYPES
        from ringattn.training.steps import DamagedData, Diverged
        from ringattn.training.stopping import stop_requests

        job = prepare(run, run_dir, world, _tokenizing())
        device = pick_device(run.device)
        if run.memory.loss == "liger" and device.type != "cuda":
            raise ValueError(f"memory.loss=liger needs a GPU; this process has {device.type}")
        select(run.kernel, DTYPES[run.precision], device, run.model.head_dim)
    except ValueError as error:
        # What is wrong may be wrong on one machine only, so each has a voice.
        return refuse(f"train.py: {error}")

    if rank == 0 and run.engine.notice:
        print(run.engine.notice, flush=True)
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    try:
        set_limit(run.memory.limit, device)
        start_distributed(device, run.parallel.timeout_s, run.engine)
        with stop_requests() as stops, claimed(job) as job:  # by another name, if that was taken
            if not _train(job, device, stops):
                return UNFINISHED
    except loop.Refused as error:  # raised on all ranks
        return refuse(f"train.py: {error}")
    except (Diverged, DamagedData, NotFinite, SaveFailed, Damaged) as error:  # raised on all ranks
        if rank == 0:
            print(f"train.py: {error}", file=sys.stderr)
        return FAILED
    except (MemoryError, RuntimeError, ImportError, OSError, DataError) as error:
        if isinstance(error, OSError | DataError) and not out_of_memory(error):
            where = f"rank {rank}: {error} (run directory: {job.run_dir})"
            print(f"train.py: {where}", file=sys.stderr)
            return FAILED
        if not out_of_memory(error):
            raise
        lines = str(error).strip().splitlines()
        reason = f"rank {rank} ran out of memory: {lines[0] if lines else type(error).__name__}"
        write_failure(job.run_dir, "memory", reason)
        print(f"train.py: {reason} (run directory: {job.run_dir})", file=sys.stderr)
        # Peers wait in an exchange that will not come: no orderly end. torchrun stops them.
        sys.stderr.flush()
        os._exit(OUT_OF_MEMORY)
    finally:
        end_distributed()
    return 0


def train(job, device) -> bool:
    """Trains one job in an initialised world. False where it was stopped by another machine's
    request: see :func:`_unasked`."""
    from ringattn.training.stopping import stop_requests

    with stop_requests() as stops, claimed(job) as job:
        return _train(job, device, stops)


def _train(job, device, stops: Sized) -> bool:
    from ringattn.context import Context
    from ringattn.training import loop
    from ringattn.training.observing.heartbeat import Heartbeat

    keys, kernel = job.run.parallel, job.run.kernel
    context = Context.create(keys.cp, device, kernel, keys.timeout_s)
    with Heartbeat(keys.timeout_s) as heartbeat:
        done = loop.train(job, context, stops, heartbeat)
    return done or not _unasked(stops)


@contextmanager
def claimed(job) -> Iterator[Any]:
    """The job, in its run directory: what rank 0 has found holds for all, the directory is made and
    nobody else's meanwhile. Collective. Raises loop.Refused on all ranks."""
    from dataclasses import replace

    import torch.distributed as dist

    from ringattn.training import loop
    from ringattn.training.launching import directory

    with ExitStack() as held:
        problem, run_dir, token = "", job.run_dir, ""
        if dist.get_rank() == 0:
            new = job.run.run_dir is None and not directory.begun(run_dir)
            try:
                run_dir = directory.create(run_dir, new)
                token = held.enter_context(directory.Lock(run_dir)).token
            except (directory.InUse, OSError) as error:
                problem = str(error)
        # Also the hardware: on each machine it may be another, and all must choose one schedule.
        names = ("resume", "remarks", "hardware")
        values = {name: getattr(job, name) for name in names} | {"run_dir": run_dir}
        shared = [values, problem, token]
        dist.broadcast_object_list(shared)
        values, problem, token = shared
        if problem:
            raise loop.Refused(problem)
        job = replace(job, **values)
        _see_run_dir(job, token)
        yield job


def _unasked(stops: Sized) -> bool:
    """Collective. Whether no process of this rank's launcher was asked to stop. Then that launcher
    must not take the run for finished: it has to be there when the other machine comes back."""
    import torch.distributed as dist

    own = (living.place(), os.getppid())
    each: list[tuple] = [()] * dist.get_world_size()
    dist.all_gather_object(each, (own, bool(stops)))
    unasked = own not in {launcher for launcher, asked in each if asked}
    if unasked and os.environ.get("LOCAL_RANK") == "0":
        print(
            "train.py: stopped by a request to another machine, not to "
            f"{socket.gethostname()}: exit status {UNFINISHED}, so that torchrun --max-restarts "
            "waits for it (both with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1)",
            file=sys.stderr,
        )
    return unasked


def _see_run_dir(job, token: str) -> None:
    """Collective. Raises loop.Refused if checkpoints are to be written to a directory that another
    machine does not see: each rank writes its part of them there."""
    import torch.distributed as dist

    from ringattn.training import loop
    from ringattn.training.launching import directory

    blind = job.run.checkpoint.every is not None and not directory.shared(job.run_dir, token)
    where: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(where, socket.gethostname() if blind else "")
    if names := sorted({f"rank {r} on {name}" for r, name in enumerate(where) if name}):
        raise loop.Refused(
            f"run_dir={job.run_dir} is not the same directory for all machines: {names[0]} does "
            "not see what rank 0 writes there; give one on a file system that all share, or "
            "checkpoint.every=null for a run without checkpoints"
        )


def _tokenizing() -> Callable[[int, int], None]:
    """Speaks of every tenth of the text that this process tokenizes."""
    tenths_printed = 0

    def report(done: int, total: int) -> None:
        nonlocal tenths_printed
        if (tenths := 10 * done // max(total, 1)) > tenths_printed:
            tenths_printed = tenths
            print(f"tokenizing: {10 * tenths} % of {total / 1e6:,.1f} MB", flush=True)

    return report


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
