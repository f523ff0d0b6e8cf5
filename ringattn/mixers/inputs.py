"""What ``linear`` and ``delta`` are given, as one value."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ringattn.execution.carriers import Comm
from ringattn.mixers.moving import moved
from ringattn.planning.segments import Segments
from ringattn.planning.state_exchange import Relayout, StateBytes


@dataclass(frozen=True)
class Inputs:
    """Tensors of this rank's tokens as :func:`ringattn.mixers.linear` takes them; ``beta`` is None
    without a delta rule."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    decay: torch.Tensor | None
    beta: torch.Tensor | None
    scale: float
    initial: torch.Tensor | None

    @property
    def vectors(self) -> bool:
        """Whether each of dk has a decay of its own."""
        return self.decay is not None and self.decay.dim() == 4

    @property
    def bytes(self) -> StateBytes:
        """On every rank alike: no number of its own tokens counts."""
        batch, _, heads, dk = self.k.shape
        rows = dk if self.vectors else 1
        every = (self.q, self.k, self.v, self.beta, self.decay)
        given = [x for x in every if x is not None and x.dim() > 1]
        return StateBytes(
            state=4 * batch * heads * dk * self.v.shape[3],
            transition=4 * batch * heads * (rows if self.beta is None else dk * dk),
            given=sum(batch * x.shape[2:].numel() * x.element_size() for x in given),
            returned=batch * self.v.shape[2:].numel() * self.v.element_size(),
        )

    def check(self, segments: Segments, comm: Comm) -> None:
        """Raises ValueError for what does not fit."""
        q, k, v, decay = self.q, self.k, self.v, self.decay
        if segments.world != comm.world:
            raise ValueError(f"segments of {segments.world} ranks in a group of {comm.world}")
        tokens = segments.layout.count(comm.rank)
        if q.shape != k.shape or v.shape[:3] != k.shape[:3]:
            raise ValueError(
                "q, k must be [batch, tokens, heads, dk] and v [batch, tokens, heads, dv], got "
                f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
            )
        if k.shape[1] != tokens:
            raise ValueError(f"{k.shape[1]} tokens, and rank {comm.rank} owns {tokens}")
        if decay is not None and decay.shape not in (k.shape[2:3], k.shape[:3], k.shape):
            raise ValueError(
                f"decay must be [heads], [batch, tokens, heads] or [batch, tokens, heads, dk], got "
                f"{list(decay.shape)}"
            )

    def moved(self, move: Relayout, comm: Comm) -> Inputs:
        """In another layout. Collective."""
        constant = self.decay is not None and self.decay.dim() == 1
        own = [self.q, self.k, self.v, None if constant else self.decay, self.beta]
        q, k, v, decay, beta = moved(own, move, comm)
        decay = self.decay if constant else decay
        return replace(self, q=q, k=k, v=v, decay=decay, beta=beta)

    def spread(self) -> Inputs:
        """With a decay of each token, where one is given for each head."""
        if self.decay is None or self.decay.dim() > 1:
            return self
        return replace(self, decay=self.decay.expand(self.k.shape[:3]))
