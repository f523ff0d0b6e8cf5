"""Whether ranks want gradients alike: the backward of one would wait for the others."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from ringattn.execution.carriers import ProcessRank, connect

# Calls in each group, which all of its ranks make alike.
_CALLS: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()


def check_wanted(group: Any, *tensors: torch.Tensor | None) -> None:
    """To be called by all ranks of ``group`` at every call. At the first, second, fourth, eighth...
    they ask each other, wherever tensors may have gradients at all: not under no_grad, in
    inference, or in a compiled graph, which runs without, there a rank has no say.

    Raises ValueError on all ranks if some want gradients and some do not.
    """
    given = [x for x in tensors if x is not None]
    # Traced, there is nobody to ask.
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
    _CALLS[group] = count = _CALLS.get(group, 0) + 1
    if count & (count - 1):
        return
    says, wants = torch.is_grad_enabled(), any(x.requires_grad for x in given)
    device = "cpu" if dist.get_backend(group) == "gloo" else given[0].device
    each = torch.zeros(comm.world, 2, dtype=torch.int32, device=device)
    each[comm.rank] = torch.tensor([says and wants, says and not wants])
    try:
        dist.all_reduce(each, group=group)
    except RuntimeError as error:
        raise RuntimeError(f"ranks ask each other, at call {count}: no answer") from error
    some, others = (column.nonzero()[:, 0].tolist() for column in each.T)
    if some and others:
        raise ValueError(
            f"ranks {some} of the group want gradients, ranks {others} none (requires_grad): their "
            "backward would wait for the others for ever"
        )
