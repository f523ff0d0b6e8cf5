"""Whether all ranks want gradients, or none: the backward of one would wait for the others."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from ringattn.execution.carriers import ProcessRank, connect

# What ranks have found alike before, by group: asked once for each answer, not at every call.
_FOUND: WeakKeyDictionary[dist.ProcessGroup, set[bool]] = WeakKeyDictionary()


def check_wanted(group: Any, *tensors: torch.Tensor | None) -> None:
    """Collective over ``group``, where it is called there for the first time with gradients, or
    without.

    Raises ValueError on all ranks where only some want them. One rank that changes its mind later,
    alone, is not seen here: it waits until the group's timeout.
    """
    given = [x for x in tensors if x is not None]
    # Neither traced nor compiled: then there is nobody to ask.
    if any(type(x) not in (torch.Tensor, torch.nn.Parameter) for x in given):
        return
    comm = connect(group)
    while not isinstance(comm, ProcessRank):
        if not hasattr(comm, "carrier"):  # threads of one process: who waits in vain is told
            return
        comm = comm.carrier
    if comm.world == 1:
        return
    group = comm.group or dist.group.WORLD
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    found = _FOUND.setdefault(group, set())
    if wanted in found:
        return
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    each = torch.full((comm.world, 1), wanted, dtype=torch.uint8, device=device)
    peers = [peer for peer in range(comm.world) if peer != comm.rank]
    sends = [(each[comm.rank], peer) for peer in peers]
    recvs = [(each[peer], peer) for peer in peers]
    comm.start(sends, recvs, "whether gradients are wanted, before the first call").wait()
    if 0 < (count := int(each.sum())) < comm.world:
        some = [rank for rank, (wants,) in enumerate(each.tolist()) if wants]
        raise ValueError(
            f"ranks {some} of the group want gradients, the other {comm.world - count} none "
            "(requires_grad, no_grad): their backward would wait for the others for ever"
        )
    found.add(wanted)
