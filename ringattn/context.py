"""The data x context mesh, the loss of split sequences as a global token mean, and the step-0
self-check.

One place scales the loss: the engine averages gradients over the whole world (and over
accumulation steps), so a local sum is multiplied by that number and divided by the global count
of supervised tokens. Nothing else in the project knows about the split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from ringattn.batches import IGNORED, position_ids, shift_labels
from ringattn.execution.attention import ring_attention
from ringattn.planning import masks
from ringattn.planning.layer_plans import ONE, LayerPlans
from ringattn.planning.layouts import Layout
from ringattn.planning.plan import Plan
from ringattn.strategy import Strategy

__all__ = [
    "IGNORED",
    "Along",
    "Attend",
    "Attends",
    "Context",
    "Strategy",
    "check_engaged",
    "check_same_data",
    "loss_sum",
    "position_ids",
    "shift_labels",
]

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# What a state goes by: its segments and the group. Sets of keys: they, blocks, group and kernel.
Along = Mapping[str, Any]
Attends = Attend | Mapping[str, Attend | Along]  # of all layers, or by kind of layer


@dataclass(frozen=True)
class Context:
    """This process's place in the mesh: sequences are split over ``cp`` ranks, of which it is
    ``cp_rank``; batches over ``dp`` groups of them, of which it is in ``dp_rank``. ``device``:
    where its tensors are; ``kernel``: the block kernel, as of :func:`ringattn.ring_attention`."""

    device: torch.device
    cp: int
    cp_rank: int
    dp: int
    dp_rank: int
    mesh: DeviceMesh  # [data, context]
    kernel: str = "auto"

    @classmethod
    def create(
        cls, cp: int, device: torch.device, kernel: str = "auto", timeout_s: float | None = None
    ) -> Context:
        """Needs an initialised process group; neighbouring ranks share a sequence. ``device`` and
        ``kernel`` as in the class; ``timeout_s``: how long an exchange may take (None: torch's
        default).

        Raises ValueError when cp does not divide the world.
        """
        world = dist.get_world_size()
        if cp < 1 or world % cp:
            raise ValueError(f"cp={cp} must divide the world of {world} ranks")
        mesh = init_device_mesh(device.type, (world // cp, cp), mesh_dim_names=("data", "context"))
        if timeout_s is not None:
            for group in mesh.get_all_groups():  # the mesh's own do not inherit the default one's
                _set_pg_timeout(timedelta(seconds=timeout_s), group)
        return cls(
            device=device,
            cp=cp,
            cp_rank=mesh.get_local_rank("context"),
            dp=world // cp,
            dp_rank=mesh.get_local_rank("data"),
            mesh=mesh,
            kernel=kernel,
        )

    @property
    def cp_group(self) -> dist.ProcessGroup:
        """The ranks that share this process's sequence, for ``ring_attention(group=...)``."""
        return self.mesh.get_group("context")

    @property
    def world(self) -> int:
        """Number of processes: ``cp * dp``."""
        return self.cp * self.dp

    def attend(self, plans: Plan | LayerPlans, carrier: Any = None) -> Attends:
        """Attention over the split sequence, by its ``plans``, as a function of local q, k, v
        ``[batch, local tokens, heads, head_dim]``: what layers call; of LayerPlans, by kind of
        layer, for those with a state or sets of keys what they go by. ``carrier``: in place of the
        group, a carrier of :mod:`ringattn.comm` over it."""
        group = self.cp_group if carrier is None else carrier
        attend = partial(ring_attention, group=group, kernel=self.kernel)
        if isinstance(plans, Plan):
            return partial(attend, plan=plans)
        along = {
            kind: {"segments": segments, "group": group}
            for kind, segments in plans.segments.items()
        }
        along |= {
            kind: {"sets": own.sets, "blocks": own.blocks, "group": group, "kernel": self.kernel}
            for kind, own in plans.sets.items()
        }
        of_masks = (kind for kind in plans if kind not in plans.of_set)
        return {kind: partial(attend, plan=plans[kind]) for kind in of_masks} | along

    def total(self, *values: float) -> list[float]:
        """Sums of each of ``values`` over all ranks of the world."""
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def unshard(self, part: torch.Tensor, layout: Layout, dim: int = 1) -> torch.Tensor:
        """The whole tensor, on every rank of the sequence, from each rank's ``part``, its
        ``layout.shard`` along ``dim``.

        Collective over the sequence's ranks, which may own unequal counts. No gradient flows.
        """
        most = max(layout.count(rank) for rank in layout.ranks)
        own = part.detach().movedim(dim, 0)
        padded = own.new_zeros(most, *own.shape[1:])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in layout.ranks]
        dist.all_gather(parts, padded, group=self.cp_group)
        parts = [x[: layout.count(rank)].movedim(0, dim) for rank, x in enumerate(parts)]
        return layout.unshard(parts, dim)

    def scaled_loss(self, loss_sum: torch.Tensor, supervised: float, accum: int) -> torch.Tensor:
        """What to hand to an engine that averages over the world and over ``accum`` micro-steps.

        ``loss_sum`` is over local tokens, ``supervised`` the global count of supervised tokens in
        the whole optimizer step. The resulting gradient is that of the global token mean.
        """
        return loss_sum * (self.world * accum / max(supervised, 1.0))


def loss_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy summed over supervised tokens, float32: 0 and connected if there are none.

    logits ``[batch, tokens, vocab]``; labels ``[batch, tokens]``, already shifted, IGNORED where
    not supervised.
    """
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def check_engaged(
    context: Context,
    strategy: Strategy,
    forward: Callable[[torch.Tensor, torch.Tensor, Attends], torch.Tensor],
    vocab_size: int,
    kinds: Sequence[str] = (ONE,),
    states: Sequence[str] = (),
) -> None:
    """Proves with the real model and groups that tokens on one rank reach another, in the layers of
    each kind.

    ``context`` and ``strategy`` are the run's. ``forward(tokens, positions, attend)`` gives logits
    ``[batch, local tokens, vocab_size]``. The first token of a short sequence is
    changed; where in the layers of one kind every token attends itself and the first, every later
    logit must move, and where each attends itself only, none may. Two keys a row keep the effect
    far above rounding, however many ranks there are. Of ``states``, kinds that carry one, documents
    are of two tokens that lie across segments: where all first ones are changed, the second ones
    must move, however fast the state decays (through a state or a halo, which it does not tell
    apart); so too of kinds that attend sets of keys, with blocks and windows of single tokens and
    one bucket, so that first ones are reached through the finest summaries or a choice (of nsa,
    which has both, it does not tell which). Raises RuntimeError on all ranks when the model ignores
    the plan.
    """
    smallest = {kind: own.smallest for kind, own in strategy.sets.items()}
    strategy = replace(strategy, sets=smallest)
    n = 4 * context.cp
    alone = masks.sliding_window(n, 1)  # each token itself: one slice, however many there are
    pairs = [1, *[2] * (n // 2 - 1), 1]
    for kind in (*kinds, *states, ""):  # at last in none
        each = dict.fromkeys(kinds, alone)
        along: dict[str, Sequence[int]] = dict.fromkeys(states, [1] * n)
        changed, reached = torch.arange(n) == 0, torch.zeros(n, dtype=torch.bool)
        if kind in kinds:
            each[kind] = alone | masks.sinks(n, 1)
            reached = torch.arange(n) > 0
        elif kind in states:
            along[kind] = pairs
            changed = torch.arange(n) % 2 == 1
            changed[-1] = False
            reached = changed.roll(1)
        plans = strategy.plans(each, (*kinds, *states), along)
        own = torch.from_numpy(plans.layout.positions(context.cp_rank)).to(context.device)
        changed, reached = changed.to(context.device), reached.to(context.device)
        logits = []
        for first in (1, 2):
            tokens = torch.arange(n, device=context.device) % vocab_size
            tokens[changed] = first
            with torch.no_grad():
                logits.append(forward(tokens[own][None], own, context.attend(plans)))
        apart = (logits[0].float() - logits[1].float()).abs().amax(-1)[0]
        # Experts that get other tokens beside its own may round a token otherwise.
        noise = (64 if logits[0].itemsize > 2 else 4) * torch.finfo(logits[0].dtype).eps
        largest = logits[0].float().abs().max() if len(own) else 0.0
        should = reached[own]
        moved = torch.where(should, apart > 0, apart > noise * largest)
        wrong = (moved != should) & ~changed[own]
        if context.total(float(wrong.sum()))[0]:
            several = len(kinds) + len(states) > 1
            raise RuntimeError(
                "self-check failed: with "
                + ("separate documents the first token leaks into later ones" if not kind
                   else f"documents of two tokens in the layers of kind {kind}, first ones do not "
                   "reach second ones, and those alone" if kind in states
                   else "a first token that all attend"
                   + (f" in the layers of kind {kind}" if several else "")
                   + ", it does not reach every later one")
                + "; the model does not use the attention it is given"
            )  # fmt: skip


def check_same_data(context: Context, sequences: list[int], digest: str) -> None:
    """Proves that ranks which share a sequence read the same text, and others other sequences.

    ``context`` is the run's; ``digest`` stands for the text of ``sequences`` as this rank reads it.
    Raises RuntimeError on all ranks, naming a pair that does not agree.
    """
    everyone: list[Any] = [None] * context.world
    dist.all_gather_object(everyone, (context.dp_rank, sequences, digest))
    for b, (dp_b, sequences_b, digest_b) in enumerate(everyone):
        for a, (dp_a, sequences_a, digest_a) in enumerate(everyone[:b]):
            same = sequences_a == sequences_b
            if (not same or digest_a != digest_b) if dp_a == dp_b else same:
                raise RuntimeError(
                    f"self-check failed: ranks {a} and {b} (data coordinates {dp_a} and {dp_b}) "
                    f"read sequences {sequences_a} and {sequences_b}, text {digest_a[:8]} and "
                    f"{digest_b[:8]}"
                )
