"""What all ranks of a sequence must know of each other: small numbers before any of them goes on,
and whole sequences."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ringattn.execution.carriers import Comm, ProcessRank
from ringattn.planning.layouts import Layout


def gather(comm: Comm, values: torch.Tensor) -> torch.Tensor:
    """``[world, len(values)]``: the values ``[count]`` of every rank, on the host. Collective."""
    own = values.detach().cpu().contiguous()
    if comm.world == 1:
        return own[None]
    if isinstance(comm, ProcessRank):
        device = own.device
        if dist.get_backend(comm.group) == "nccl":
            device = torch.device("cuda", torch.cuda.current_device())
        everyone = torch.empty(comm.world * len(own), dtype=own.dtype, device=device)
        dist.all_gather_into_tensor(everyone, own.to(device), group=comm.group)
        return everyone.view(comm.world, -1).cpu()
    everyone = own.repeat(comm.world, 1)
    peers = [peer for peer in range(comm.world) if peer != comm.rank]
    sends = [(own, peer) for peer in peers]
    comm.start(sends, [(everyone[peer], peer) for peer in peers], "what ranks must agree on").wait()
    return everyone


def total(comm: Comm, values: torch.Tensor) -> torch.Tensor:
    """The sum of :func:`gather` over the ranks, in their order: alike on all of them."""
    return gather(comm, values).sum(0).to(values.device)


def words(comm: Comm, text: str, most: int = 1000) -> list[str]:
    """The text of every rank, its first ``most`` bytes. Collective."""
    own = text.encode()[:most].ljust(most, b"\0")
    everyone = gather(comm, torch.frombuffer(bytearray(own), dtype=torch.uint8))
    return [bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore") for row in everyone]


def whole(comm: Comm, layout: Layout, x: torch.Tensor) -> torch.Tensor:
    """The whole ``[batch, tokens, ...]`` on every rank, of parts ``[batch, local tokens, ...]``; no
    gradient flows. Collective."""
    parts = [x.new_empty(x.shape[0], layout.count(r), *x.shape[2:]) for r in layout.ranks]
    parts[comm.rank] = x.detach().contiguous()
    others = [rank for rank in layout.ranks if rank != comm.rank]
    sends = [(parts[comm.rank], rank) for rank in others]
    comm.start(sends, [(parts[rank], rank) for rank in others], "a whole sequence").wait()
    return layout.unshard(parts)
