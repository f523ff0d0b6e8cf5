"""How fast ranks exchange, in the terms of :class:`ringattn.cost.Link`: on one machine, and over
links between machines, which only a launch on several can see.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ringattn.execution.carriers import ProcessRank, end_distributed

SECONDS = 0.15  # that one figure is measured for, at least
_BYTES = tuple(2**k for k in range(12, 26))  # of an exchange
_LONG_S = 1.0  # an exchange that takes longer is the largest that is tried
_TURNS = 20  # of a kernel, alone and beside an exchange
_SHARED = 0.9  # of what ranks reach alone: below that, they share a node's link
STEADY = 0.1  # difference of peaks, later or on another node, that is worth a word
_WAIT = timedelta(hours=1)  # for other machines to have measured themselves


def median_seconds(
    work: Callable[[], Any],
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> float:
    """Of ``work``. ``group``: it exchanges there, so all ranks of it repeat alike, and begin each
    time together: two that exchange in turns would leave each way of a link idle half of the
    time."""

    def once() -> float:
        if group is not None:
            dist.barrier(group)
        begin = time.perf_counter()
        work()
        _wait(device)
        return time.perf_counter() - begin

    repeat = max(5, min(200, int(SECONDS / max(once(), 1e-9))))
    if group is not None:
        agreed = torch.tensor(float(repeat), device=device)
        dist.all_reduce(agreed, dist.ReduceOp.MIN, group=group)
        repeat = int(agreed)
    return statistics.median(once() for _ in range(repeat))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream().synchronize()


class Links:
    """Exchanges of all ranks of ``group`` at once, each with those before and after it; where it is
    cut into nodes of ``node`` ranks, with all ranks of the nodes before and after its own."""

    def __init__(self, device: torch.device, group: dist.ProcessGroup, node: int = 1) -> None:
        self.device, self.group = device, group
        self.comm = ProcessRank(group)
        own = self.comm.rank // node * node
        self.after, self.before = (
            [(own + way + i) % self.comm.world for i in range(node)] for way in (node, -node)
        )

    def exchange(self) -> dict[str, Any]:
        """A link's description."""
        few, many = self._took(64), self._took(64 * 16, 32)
        message = max(0.0, (many - few) / 30)
        bandwidth = {}
        for size in _BYTES:
            took = self._took(size)
            bandwidth[size] = size / max(took - few, 0.05 * took)
            if self._slowest(took) > _LONG_S:
                break
        return {
            "bandwidth": bandwidth,
            "latency": max(0.0, few - 2 * message),
            "message": message,
        }

    def collective(self, rate: float) -> float:
        """Bytes/s of an all-reduce over ``rate``, that of an exchange."""
        if self.comm.world == 1:
            return 1.0
        size = 2**25 if rate > 2**26 else 2**23
        x = torch.randn(size // 4, device=self.device)
        took = self._time(lambda: dist.all_reduce(x, group=self.group))
        return 2 * size * (self.comm.world - 1) / self.comm.world / took / rate

    def overlap_efficiency(self) -> float:
        """Share of an exchange's time that does not lengthen a kernel beside it, which takes as
        long. In turns, since cores are not always as fast."""
        if self.comm.world == 1:
            return 1.0
        size = 2**23
        while size > 2**16 and self._slowest(self._took(size)) > 2 * SECONDS:
            size //= 4
        start, a = self._ring(size), torch.randn(512, 512, device=self.device)
        alone = self._time(lambda: start().wait())
        product = median_seconds(lambda: a @ a, self.device)
        agreed = torch.tensor(max(1.0, alone / product), device=self.device)
        dist.all_reduce(agreed, group=self.group)
        count = round(float(agreed) / self.comm.world)
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(_TURNS):
            for beside, found in enumerate(times):
                dist.barrier(self.group)
                begin = time.perf_counter()
                pending = start() if beside else None
                for _ in range(count):
                    torch.mm(a, a)
                _wait(self.device)
                found.append(time.perf_counter() - begin)
                if pending is not None:
                    pending.wait()
        only, together = map(statistics.median, times)
        return min(1.0, max(0.0, 1 - (together - only) / alone))

    def rate(self, size: int) -> float:
        """Bytes/s of one rank in exchanges of ``size`` bytes, that of the slowest."""
        return size / self._slowest(self._took(size))

    def _ring(self, size: int, parts: int = 2) -> Callable[[], Any]:
        """Starts an exchange of ``size`` bytes in ``parts`` messages with each neighbour."""
        each = max(1, size // 4 // parts // len(self.after))
        sends, recvs = (
            [(torch.randn(each, device=self.device), peer) for peer in peers for _ in range(parts)]
            for peers in (self.after, self.before)
        )
        return lambda: self.comm.start(sends, recvs, "calibration")

    def _took(self, size: int, parts: int = 2) -> float:
        if self.comm.world == 1:
            return 1e-6
        start = self._ring(size, parts)
        start().wait()
        return self._time(lambda: start().wait())

    def _time(self, work: Callable[[], Any]) -> float:
        return median_seconds(work, self.device, self.group)

    def _slowest(self, seconds: float) -> float:
        took = torch.tensor(seconds, device=self.device)
        dist.all_reduce(took, dist.ReduceOp.MAX, group=self.group)
        return float(took)


def launched() -> bool:
    """Whether torchrun started this process as one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ


def unlaunched() -> dict[str, str]:
    """The environment without what torchrun has put into it, for a torchrun of its own."""
    prefixes = ("TORCHELASTIC_", "GROUP_", "ROLE_", "MASTER_", "LOCAL_", "PET_")
    names = ("RANK", "WORLD_SIZE")
    return {k: v for k, v in os.environ.items() if not k.startswith(prefixes) and k not in names}


def nodes(
    device: str, one: Callable[[dict[str, Any]], dict[str, Any]], say: Callable[[str], None]
) -> dict[str, Any] | None:
    """The description of several machines, measured by all ranks of a torchrun launch; rank 0 has
    it, the others None. First the links; then ``one``, which gets those, measures a machine: one
    rank of each calls it, all at the same time, while the others wait.

    Raises ValueError where machines have unequal numbers of ranks.
    """
    local, own = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    place = torch.device(device, own) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(place)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=_WAIT)
    rank, world = dist.get_rank(), dist.get_world_size()
    sizes: list[Any] = [None] * world
    dist.all_gather_object(sizes, local)
    if set(sizes) != {local}:
        raise ValueError("as many ranks on each machine are needed: the same --nproc-per-node")
    say(f"links of {world // local} machines of {local} ranks")
    firsts = range(0, world, local)
    inside = [dist.new_group(range(first, first + local)) for first in firsts][rank // local]
    alone = dist.new_group(firsts)
    links: dict[str, Any] = {"node_size": local}
    if local > 1:
        links["intra_node"] = _link(Links(place, inside))
    if world > local:
        links["inter_node"] = _between(place, alone if own == 0 else None, local)
    each: list[Any] = [None] * world
    dist.all_gather_object(each, one(links) if own == 0 else None)
    found = [description for description in each if description]
    for precision, peak in found[0]["peak"].items():
        other = max((x["peak"][precision] for x in found), key=lambda x: abs(x / peak - 1))
        if abs(other / peak - 1) > STEADY:
            say(f"machines differ: {peak / 1e9:,.0f} and {other / 1e9:,.0f} GFLOP/s {precision}; "
                "the first one's figures are written")  # fmt: skip
    end_distributed()
    return found[0] if rank == 0 else None


def _link(links: Links) -> dict[str, Any]:
    """The description of a link, of all its ranks."""
    link = links.exchange()
    rate = large(link)
    return link | {
        "collective": links.collective(rate),
        "overlap_efficiency": links.overlap_efficiency(),
    }


def _between(
    place: torch.device, alone: dist.ProcessGroup | None, local: int
) -> dict[str, Any] | None:
    """Of the link between machines: of one rank of each, ``alone``, and of all at once."""
    size, link = 2**22, None
    if alone is not None:
        links = Links(place, alone)
        link = links.exchange() | {"overlap_efficiency": links.overlap_efficiency()}
        single = links.rate(size)
    dist.barrier()
    everyone = Links(place, dist.group.WORLD, local)
    together = everyone.rate(size)
    rate = [large(link) if link else 0.0]
    dist.broadcast_object_list(rate, 0)
    collective = everyone.collective(rate[0])
    if link is not None:
        link["collective"] = collective
        if together < _SHARED * single:
            link["node"] = local * together
    return link


def large(link: dict[str, Any]) -> float:
    """Bytes/s of an exchange of 16 MiB, or the largest that was measured."""
    bandwidth = link["bandwidth"]
    return bandwidth[min(2**24, max(bandwidth))]
