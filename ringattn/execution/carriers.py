"""Exchanges between ranks: batched, non-blocking, in the same order on every rank.

Two carriers with one interface: a torch.distributed process group, and threads of one process
(virtual ranks, for tests and checks). Peers are always ranks of the group.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist

GRACE_S = 0.1

Message = tuple[torch.Tensor, int]  # (contiguous buffer, peer)


class Pending(Protocol):
    def wait(self) -> None:
        """Returns when every buffer is sent and filled; RuntimeError names what did not come."""


@runtime_checkable
class Comm(Protocol):
    rank: int
    world: int

    def start(self, sends: Sequence[Message], recvs: Sequence[Message], label: str) -> Pending:
        """Begins one exchange. ``label`` names it in errors."""


_CARRIERS: WeakValueDictionary[str, Comm] = WeakValueDictionary()


def name_of(group: Any) -> str:
    """A name for ``group`` that :func:`connect` takes: operators of torch pass strings, and a
    process group has one of its own."""
    if group is None:
        return ""
    if isinstance(group, dist.ProcessGroup):
        return group.group_name
    name = f"carrier {id(group)}"
    if _CARRIERS.get(name) is not group:
        _CARRIERS[name] = _carrier(group)
    return name


def connect(group: Any) -> Comm:
    """The carrier for ``group``: a process group (None or "": the default one), the name of one, or
    a carrier itself."""
    if isinstance(group, str):
        known = _CARRIERS.get(group)
        if known is not None:
            return known
        by_name: Any = dist.distributed_c10d
        group = by_name._resolve_process_group(group) if group else None
    if group is None or isinstance(group, dist.ProcessGroup):
        return ProcessRank(group)
    return _carrier(group)


def check_world(comm: Comm, world: int) -> None:
    """Raises ValueError where a plan for ``world`` ranks meets a group of others."""
    if comm.world == world:
        return
    why = ""
    if isinstance(comm, ProcessRank) and not dist.is_initialized():
        why = (
            "; torch.distributed is not initialized: start the processes with torchrun, and join "
            "them with torch.distributed.init_process_group"
        )
    raise ValueError(f"the plan is for {world} ranks, the group has {comm.world}{why}")


def _carrier(group: Any) -> Comm:
    if not isinstance(group, Comm):
        raise ValueError(
            f"group must be a process group or a carrier of ringattn.comm, got {group!r}; of a "
            "device mesh take mesh.get_group(name)"
        )
    return group


class ProcessRank:
    """This process as a rank of a torch.distributed group; a world of one needs no group."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        alone = group is None and not dist.is_initialized()
        self.group = group
        self.rank = 0 if alone else dist.get_rank(group)
        self.world = 1 if alone else dist.get_world_size(group)

    def start(self, sends: Sequence[Message], recvs: Sequence[Message], label: str) -> Pending:
        """Begins one exchange: ``sends`` and ``recvs`` are (contiguous tensor, peer), all at once.
        ``label`` names it in errors; wait for what is returned."""
        copies = []
        if self._staged(sends, recvs):
            sends = [(buffer.cpu(), peer) for buffer, peer in sends]
            hosts = [(torch.empty_like(buffer, device="cpu"), peer) for buffer, peer in recvs]
            copies = [(to, host) for (to, _), (host, _) in zip(recvs, hosts, strict=True)]
            recvs = hosts
        # What is received first: gloo tells a peer that there is room for its message behind what
        # is sent to it, so two that exchange would take turns, twice as long over a slow link.
        ops = [
            dist.P2POp(op, buffer, group=self.group, group_peer=peer)
            for op, messages in ((dist.irecv, recvs), (dist.isend, sends))
            for buffer, peer in messages
        ]
        with _named(label, sends, recvs):
            works = dist.batch_isend_irecv(ops) if ops else []
        return _ProcessPending(works, sends, recvs, label, copies)

    def _staged(self, sends: Sequence[Message], recvs: Sequence[Message]) -> bool:
        """Whether messages pass through host memory: gloo reads no other."""
        away = any(buffer.device.type != "cpu" for buffer, _ in (*sends, *recvs))
        return away and dist.get_backend(self.group) == "gloo"


@dataclass
class _ProcessPending:
    works: list[dist.Work]
    sends: Sequence[Message]  # held so that no buffer is freed in flight
    recvs: Sequence[Message]
    label: str
    copies: Sequence[tuple[torch.Tensor, torch.Tensor]]  # (to, from), once everything has come

    def wait(self) -> None:
        with _named(self.label, self.sends, self.recvs):
            for work in self.works:
                work.wait()
        for to, host in self.copies:
            to.copy_(host)


@contextmanager
def _named(label: str, sends: Sequence[Message], recvs: Sequence[Message]) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(_describe(label, sends, recvs)) from error


def _describe(label: str, sends: Sequence[Message], recvs: Sequence[Message]) -> str:
    moves = [f"to rank {peer} {list(x.shape)}" for x, peer in sends]
    moves += [f"from rank {peer} {list(x.shape)}" for x, peer in recvs]
    return f"the exchange of {label} failed: {', '.join(moves)}"


_ENDED = None  # what a rank leaves in its peers' boxes when it is done, well or not


class VirtualWorld:
    """``world`` ranks as threads of this process, exchanging through queues. ``timeout``: seconds
    that a rank waits for another that is still at work."""

    _boxes: dict[tuple[int, int], queue.SimpleQueue[Any]]  # from, to: of one run

    def __init__(self, world: int, timeout: float = 600.0) -> None:
        self.world, self.timeout = world, timeout

    def run(self, work: Callable[[VirtualRank], Any]) -> list[Any]:
        """``work(rank)`` for every rank at once; the results in rank order. Raises what was
        raised first: a rank's own error; ConnectionError if one waits for another that has ended;
        TimeoutError if they wait for each other."""
        each = range(self.world)
        self._boxes = {(a, b): queue.SimpleQueue() for a in each for b in each}
        errors: list[BaseException] = []  # as they come: the first is the cause of the others

        def one(rank: int) -> Any:
            try:
                # Or all backwards on one GPU would share one thread of autograd, where a rank that
                # waits for another would keep that one from running.
                with torch.autograd.set_multithreading_enabled(False):
                    return work(VirtualRank(self, rank))
            except BaseException as error:
                errors.append(error)
            finally:
                for peer in each:
                    self._boxes[rank, peer].put(_ENDED)

        with ThreadPoolExecutor(self.world) as pool:
            results = list(pool.map(one, each))
        if errors:
            raise errors[0]
        return results


@dataclass
class VirtualRank:
    home: VirtualWorld
    rank: int

    @property
    def world(self) -> int:
        return self.home.world

    def start(self, sends: Sequence[Message], recvs: Sequence[Message], label: str) -> Pending:
        for buffer, peer in sends:
            self.home._boxes[self.rank, peer].put(buffer.detach().clone())
        return _VirtualPending(self, recvs, label)


@dataclass
class _VirtualPending:
    at: VirtualRank
    recvs: Sequence[Message]
    label: str

    def wait(self) -> None:
        for buffer, peer in self.recvs:
            try:
                box = self.at.home._boxes[peer, self.at.rank]
                message = box.get(timeout=self.at.home.timeout)
            except queue.Empty:
                raise TimeoutError(_describe(self.label, [], [(buffer, peer)])) from None
            if message is _ENDED:
                said = _describe(self.label, [], [(buffer, peer)])
                raise ConnectionError(f"{said}: rank {peer} has ended")
            buffer.copy_(message)


class Counted:
    """Another carrier, with the bytes that it receives and the exchanges that it starts counted."""

    def __init__(self, carrier: Comm) -> None:
        self.carrier, self.rank, self.world = carrier, carrier.rank, carrier.world
        self.received = self.exchanges = 0

    def start(self, sends: Sequence[Message], recvs: Sequence[Message], label: str) -> Pending:
        self.received += sum(buffer.nbytes for buffer, _ in recvs)
        self.exchanges += 1
        return self.carrier.start(sends, recvs, label)


class Stopwatch:
    """Seconds that named sections take, by the host's clock or, on a GPU, by events on its stream:
    a section costs the device nothing and the host a microsecond or two."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"
        self.marks: list[tuple[str, Any, Any]] = []

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        begin = self._now()
        yield
        self.marks.append((name, begin, self._now()))

    def read(self) -> dict[str, float]:
        """The sum of each section since the last call; on a GPU, waits for their end."""
        marks, self.marks = self.marks, []
        if self.gpu and marks:
            torch.cuda.current_stream().synchronize()
        sums: dict[str, float] = {}
        for name, begin, end in marks:
            took = begin.elapsed_time(end) / 1e3 if self.gpu else end - begin
            sums[name] = sums.get(name, 0.0) + took
        return sums

    def _now(self) -> Any:
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Timed:
    """Another carrier; what its exchanges keep the caller waiting is a section "exchange"."""

    def __init__(self, carrier: Comm, watch: Stopwatch) -> None:
        self.carrier, self.watch = carrier, watch
        self.rank, self.world = carrier.rank, carrier.world

    def start(self, sends: Sequence[Message], recvs: Sequence[Message], label: str) -> Pending:
        with self.watch.section("exchange"):  # packing is the kernel's; handing over is not
            pending = self.carrier.start(sends, recvs, label)
        return _TimedPending(pending, self.watch)


@dataclass
class _TimedPending:
    pending: Pending
    watch: Stopwatch

    def wait(self) -> None:
        with self.watch.section("exchange"):
            self.pending.wait()


def end_distributed() -> None:
    """Ends torch.distributed, if it has begun; call it last.

    gloo's threads need Python's lock once more after an exchange has returned, to let go of its
    tensors (torch 2.13). One that asks when the interpreter is already ending aborts the process,
    so they get the time first.
    """
    if dist.is_initialized():
        time.sleep(GRACE_S)
        dist.destroy_process_group()
