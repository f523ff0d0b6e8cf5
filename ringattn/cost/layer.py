"""What a plan costs: bytes, buffers and FLOPs of one attention layer, all read off its steps.

Conventions: bytes are those that a rank receives; a K/V row is ``kv_heads * (head_dim + v_dim)``
elements of its head share; gradients of K/V rows travel as float32. A pair costs ``2 * heads *
(head_dim + v_dim)`` FLOPs forward, and 2.5 times that in the backward, which recomputes the scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ringattn.planning.head_split import HeadSplit
from ringattn.planning.state_exchange import Incoming, StateBytes, exchange_of

if TYPE_CHECKING:
    from ringattn.planning.plan import Plan
    from ringattn.planning.segments import Segments

BACKWARD = 2.5  # matrix products of the backward, in forwards
_STATE_BYTES = 4  # partial states and K/V gradients are float32


@dataclass(frozen=True)
class AttentionShape:
    """Of one attention layer. ``itemsize``: bytes of an element of q, k and v; ``v_dim``: the
    head_dim of v, by default that of k."""

    heads: int
    kv_heads: int
    head_dim: int
    v_dim: int | None = None
    itemsize: int = 2
    batch: int = 1

    @property
    def dims(self) -> int:
        return self.head_dim + self.values

    @property
    def values(self) -> int:
        return self.head_dim if self.v_dim is None else self.v_dim

    def pair_flops(self) -> float:
        """FLOPs of one (query, key) pair over all heads in the forward."""
        return 2 * self.heads * self.dims * self.batch


@dataclass(frozen=True)
class Bytes:
    """What one rank receives in one forward and one backward."""

    forward: int
    backward: int


def received(plan: Plan, rank: int, shape: AttentionShape) -> Bytes:
    """Bytes that ``rank`` receives; the log-sum-exp of ``return_lse`` with ulysses comes on top."""
    split, batch = plan.heads(rank), shape.batch
    kv_heads = kv_heads_of(split, shape)
    row = batch * kv_heads * shape.dims
    steps = plan.steps(rank)
    rows = sum(move.tokens for step in steps for move in step.recvs)
    grads = sum(move.tokens for step in steps for move in step.grad_recvs)
    forward = rows * row * shape.itemsize
    backward = forward + grads * row * state_bytes(shape)
    if split:
        into, back = group_bytes(split, shape)
        forward += into.forward + back.forward
        backward += into.backward + back.backward
    return Bytes(forward, backward)


class MixerShape(Protocol):
    """Of one layer with a state: :class:`ringattn.models.mixer_config.Mixer`."""

    conv: int
    channels: int

    def state_bytes(self, wide: int) -> StateBytes | None: ...


def state_exchanges(
    segments: Segments, rank: int, mixer: MixerShape, itemsize: int, batch: int = 1
) -> tuple[list[Incoming], list[Incoming]]:
    """(forward, backward) of one layer with a state: the tokens before segments that its
    convolution needs, ``itemsize`` bytes an element; summaries of segments, and tokens that move
    where these weigh more."""
    halo = segments.halo(rank, mixer.conv - 1)
    row = batch * mixer.channels * itemsize
    sent = sum(len(run) for rows in halo.sends.values() for run in rows)
    forward = [Incoming(sum(halo.recvs.values()) * row, len(halo.recvs))]
    backward = [Incoming(sent * row, len(halo.sends))]
    if sizes := mixer.state_bytes(itemsize):
        sizes = sizes.times(batch)
        there, back = exchange_of(segments, sizes).incoming(rank, sizes)
        forward, backward = forward + there, backward + back
    return forward, backward


def received_states(
    segments: Segments, rank: int, mixer: MixerShape, itemsize: int, batch: int = 1
) -> Bytes:
    """Bytes that ``rank`` receives for one layer with a state: see :func:`state_exchanges`."""
    both = state_exchanges(segments, rank, mixer, itemsize, batch)
    return Bytes(*(sum(each.size for each in exchanges) for exchanges in both))


def state_bytes(shape: AttentionShape) -> int:
    """Bytes of an element of partial states and of K/V gradients."""
    return max(_STATE_BYTES, shape.itemsize)


def kv_heads_of(split: HeadSplit | None, shape: AttentionShape) -> int:
    """K/V heads that a rank holds in its ring."""
    return (
        len(split.kv_heads(split.member, shape.heads, shape.kv_heads)) if split else shape.kv_heads
    )


def group_bytes(split: HeadSplit, shape: AttentionShape) -> tuple[Bytes, Bytes]:
    """The all-to-all over heads: (to all tokens, back to own tokens)."""
    heads, item, member = shape.heads, shape.itemsize * shape.batch, split.member
    others = [m for m in range(split.degree) if m != member]
    kv = [len(split.kv_heads(m, heads, shape.kv_heads)) for m in range(split.degree)]
    share = heads // split.degree

    def tokens(rows, m: int) -> int:
        return sum(map(len, rows[m]))

    q_in = sum(tokens(split.q_rows, m) for m in others) * share
    kv_in = sum(tokens(split.k_rows, m) for m in others) * kv[member]
    q_back = tokens(split.q_rows, member) * share * len(others)
    kv_back = tokens(split.k_rows, member) * sum(kv[m] for m in others)
    grad = state_bytes(shape) * shape.batch if split.replicates(heads, shape.kv_heads) else item
    into = Bytes((q_in * shape.head_dim + kv_in * shape.dims) * item, q_in * shape.values * item)
    back = Bytes(
        q_back * shape.values * item, q_back * shape.head_dim * item + kv_back * shape.dims * grad
    )
    return into, back


def lower_bound(plan: Plan, rank: int) -> int:
    """K/V rows that ``rank`` cannot do without: attended, not owned, each once."""
    need = plan.partition.rows_needed[rank // plan.ulysses]
    return int(need.sum() - need[rank // plan.ulysses])
