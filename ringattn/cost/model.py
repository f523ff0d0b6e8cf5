"""What a whole training step needs of a rank: FLOPs by part, traffic of memory and of engines, and
bytes held. Attention's own exchanges are in ``layer`` and ``timeline``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from ringattn.planning.state_exchange import StateBytes


class Mixing(Protocol):
    """What a layer has in place of attention: :class:`ringattn.models.mixer_config.Mixer`."""

    heads: int
    key_dim: int
    value_dim: int
    conv: int
    channels: int
    flops: float

    def state_bytes(self, wide: int) -> StateBytes | None: ...

    def matmul_parameters(self, dim: int) -> int: ...

    def chunk_flops(self) -> float: ...

    def kept(self, wide: int) -> int: ...


class Sizes(Protocol):
    """Of a decoder: :class:`ringattn.models.sizes.ModelConfig`."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    tied: bool

    @property
    def mixed(self) -> Mapping[Mixing, int]: ...

    @property
    def attending(self) -> int: ...

    @property
    def block_norms(self) -> int: ...

    @property
    def parameters(self) -> int: ...

    @property
    def trained(self) -> int: ...

    @property
    def matmul_parameters(self) -> int: ...


class Kept(Protocol):
    """What is kept for the backward: :class:`ringattn.models.memory.Memory`."""

    checkpoint: bool
    offload: bool
    ffn_tile: int | None
    loss_chunk: int | None

    def tiled(self, tokens: int) -> bool: ...


@dataclass(frozen=True)
class States:
    """Bytes of weights, gradients and AdamW's state of one rank: on its ``device`` by what it is,
    and in ``host`` memory."""

    device: dict[str, float]
    host: float


@dataclass(frozen=True)
class EngineTraffic:
    """Bytes that one rank receives for its engine: of weights to be gathered and of gradients to be
    reduced in a micro-step (hidden behind compute where weights are gathered layer by layer), and
    at the end of an optimizer step; and what the optimizer reads and writes.

    Ring algorithms: a gather or a scatter of n bytes over W ranks moves n (W - 1) / W; gradients
    are reduced in float32."""

    gathered: float
    reduced: float
    at_step: float
    optimizer: float


class EngineCost(Protocol):
    """What an engine's settings say of its costs, for a model with ``wide`` bytes an element, on
    ``world`` ranks of which ``cp`` share a sequence."""

    name: str

    @property
    def gathers(self) -> bool:
        """Whether weights are gathered layer by layer."""

    @property
    def on_host(self) -> bool:
        """Whether the optimizer steps in host memory."""

    def bucket(self, model: Sizes) -> int:
        """Elements of the buffer that gradients are reduced in."""

    def states(self, model: Sizes, wide: int, world: int, cp: int) -> States: ...

    def traffic(self, model: Sizes, wide: int, world: int, cp: int) -> EngineTraffic: ...


@dataclass(frozen=True)
class Setup:
    """How a run is split and what it keeps: the parts of a run that cost depends on. ``batch``:
    sequences of a micro-step, per sequence group of ``cp`` ranks; ``device``: cuda or cpu."""

    engine: EngineCost
    memory: Kept
    world: int = 1
    cp: int = 1
    ulysses: int = 1
    schedule: str = "ring"
    layout: str = "zigzag"
    precision: str = "bf16"
    batch: int = 1
    grad_accum: int = 1
    device: str = "cuda"

    @property
    def wide(self) -> int:
        """Bytes of an element that is computed with."""
        return 2 if self.precision == "bf16" else 4

    def traffic(self, model: Sizes) -> EngineTraffic:
        """Of the engine."""
        return self.engine.traffic(model, self.wide, self.world, self.cp)


def step_flops(model: Sizes, tokens: int, area: float) -> float:
    """Model FLOPs of forward and backward over ``tokens`` tokens with ``area`` attended pairs in a
    layer, on the mean: what MFU counts.

    6 per matmul parameter and token, 4 of those that are frozen; 12 * area * heads * head_dim per
    layer for attention (two products forward, four backward), three times the forward's of a state
    (see :attr:`ringattn.models.mixer_config.Mixer.flops`). Recomputed work does not count.
    """
    trained = min(model.trained, model.matmul_parameters)
    states = 3 * sum(count * mixer.flops for mixer, count in model.mixed.items())
    return (4 * model.matmul_parameters + 2 * trained + states) * tokens + (
        12 * area * model.layers * model.heads * model.head_dim
    )


def block_parameters(model: Sizes) -> tuple[int, int]:
    """Matrix parameters of a block: (projections of attention or of a mixer, on the mean over the
    blocks; feed-forward)."""
    attention = 2 * model.dim * model.head_dim * (model.heads + model.kv_heads)
    mixers = sum(n * mixer.matmul_parameters(model.dim) for mixer, n in model.mixed.items())
    mean = (model.attending * attention + mixers) // model.layers
    return mean, 3 * model.dim * model.ffn_dim


def product_flops(model: Sizes, setup: Setup, tokens: int) -> dict[str, float]:
    """FLOPs that a rank executes in matrix products outside attention, of ``tokens`` tokens of one
    micro-step, by part; what is computed again is a part of its own."""
    attention, ffn = block_parameters(model)
    # torch's checkpoint stops once it has what the backward asked for: it computes the last product
    # of a block, or of a tile, not again, and of a block of tiles not the last tile.
    again, memory = 0.0, setup.memory
    if memory.checkpoint:
        again += attention
    if memory.tiled(tokens):
        again += ffn * 2 / 3
        again += ffn * (1 - memory.ffn_tile / tokens) if memory.checkpoint else 0.0
    elif memory.checkpoint:
        again += ffn * 2 / 3
    frozen = model.trained < model.parameters
    each = 4.0 if frozen else 6.0  # of a frozen weight there is no gradient
    parts = {
        "projections": each * tokens * model.layers * attention,
        "feed-forward": each * tokens * model.layers * ffn,
        "head and loss": each * tokens * model.dim * model.vocab_size,
        "recomputed": 2.0 * tokens * model.layers * again,
    }
    if model.mixed:
        passes = 4 if memory.checkpoint else 3
        chunks = sum(count * mixer.chunk_flops() for mixer, count in model.mixed.items())
        parts["states"] = passes * tokens * chunks
    return parts | ({"adapters": 6.0 * tokens * model.trained} if frozen else {})


def elementwise_bytes(model: Sizes, setup: Setup, tokens: int) -> float:
    """Bytes that a rank reads and writes in what is no matrix product, of one micro-step: norms,
    rotation, residuals, activations, the loss. Counted by operator as the decoder calls them, each
    reading and writing all its elements once; the backward twice the forward's."""
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    width = 6 + 2 * model.block_norms
    blocks = model.layers * (width * model.dim + 5 * model.ffn_dim) * setup.wide
    blocks += model.attending * 8 * (q + kv) * setup.wide
    # What a mixer keeps it has written once, and reads and writes about as often again.
    blocks += 2 * sum(count * mixer.kept(setup.wide) for mixer, count in model.mixed.items())
    passes = 4 if setup.memory.checkpoint else 3
    outside = 9 * model.dim * setup.wide + 12 * model.vocab_size * 4
    return float(tokens) * (passes * blocks + outside)


def operators(model: Sizes, setup: Setup) -> int:
    """Operators of a micro-step, roughly: what a device that is not fed ahead waits for."""
    passes = 4 if setup.memory.checkpoint else 3
    return 40 * passes * model.attending + 150 * passes * sum(model.mixed.values()) + 100


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank: on its device, and what offloading keeps in host memory instead."""

    states: int  # weights, gradients, AdamW's state
    kept: int  # from forward to backward
    working: int  # of one block and of the loss, while they are computed
    host: int
    offloaded: int  # of host: what forward has kept
    state_parts: dict[str, int] = field(default_factory=dict)
    moments: dict[str, int] = field(default_factory=dict)  # of working: the largest of these

    @property
    def device(self) -> int:
        return self.states + self.kept + self.working


def footprint(
    model: Sizes,
    setup: Setup,
    tokens: int,
    kv_rows: int = 0,
    grad_rows: int = 0,
    summaries: int = 0,
    laid_out: int = 0,
) -> Footprint:
    """For ``tokens`` of this rank in a micro-step; ``kv_rows`` and ``grad_rows`` are those of
    :func:`ringattn.cost.buffers`, ``summaries`` bytes of other ranks' states, ``laid_out`` those of
    queries that are laid out again in attention. Without the
    framework's own share, and the copy that a checkpoint is written from (12 bytes a parameter of
    this rank, in host memory)."""
    wide, memory = setup.wide, setup.memory
    weights = setup.engine.states(model, wide, setup.world, setup.cp)
    tiled = memory.tiled(tokens)
    # A fused norm keeps its input and its output; the CPU's also what lies between.
    norm = 2 if setup.device == "cuda" else 3
    kept = block_kept(model, wide, memory.checkpoint, tiled, norm) * model.attending
    for mixer, count in model.mixed.items():
        kept += count * mixed_kept(model, mixer, wide, memory.checkpoint, tiled, norm)
    if setup.ulysses > 1 and memory.checkpoint:  # q, k, v, out too, as exchanged: once is enough
        kept += model.attending * 2 * (model.heads + model.kv_heads) * model.head_dim * wide
    # The backward of a block, which is computed again before if it is not kept. First its
    # feed-forward, when all of the block is there, and gradients of the model's width...
    q, kv = model.heads * model.head_dim, 2 * model.kv_heads * model.head_dim
    feed_forward = 3 * model.dim * wide * tokens
    if memory.checkpoint:
        again = block_kept(model, wide, False, tiled, norm) - block_kept(model, wide, True)
        feed_forward += again * tokens
    # Of a block with a state, all of it is there then; its gradients are as large.
    states = [mixer.kept(wide) for mixer in model.mixed]
    if memory.checkpoint and states:
        of_attention = wide * (2 * q + kv) + 4 * model.heads
        feed_forward += max(0, max(states) - of_attention) * tokens
    if tiled:
        feed_forward += 4 * model.ffn_dim * wide * memory.ffn_tile
    # ... then attention, when the feed-forward's are gone: gradients of out and of the model's
    # width, those of q, k and v in float32, and the blocks on their way.
    attention = ((q + model.dim) * wide + 4 * (q + kv)) * tokens
    attention += (kv_rows * wide + grad_rows * 4) * kv // setup.ulysses
    attention += laid_out
    before = (norm - 1) * model.dim + q + kv
    if memory.checkpoint:
        attention += before * wide * tokens
    elif not tiled:
        attention -= min(attention, (4 * model.ffn_dim + (norm - 1) * model.dim) * wide * tokens)
    gathered = 0
    if setup.engine.gathers:  # this block and the next
        largest = max(model.dim * model.vocab_size, sum(block_parameters(model)))
        gathered = 2 * wide * largest
    kept, offloaded = (0, kept) if memory.offload else (kept, 0)
    # The last hidden states, before and after their norm, and the gradient of the loss in them.
    tail = 3 * model.dim * wide + 4 * model.head_dim + 3 * 8
    chunk = memory.loss_chunk or max(64, tokens * model.dim // model.vocab_size)
    logits = min(chunk, tokens) * model.vocab_size * (4 + 2 * wide)
    gathered += wide * setup.engine.bucket(model)
    moments = {
        "attention": (attention if model.attending else 0) + gathered,
        "feed-forward": feed_forward + gathered,
        "loss": logits + gathered,
    }
    if states:
        passes = 2 if memory.checkpoint else 1
        moments["states"] = max(states) * tokens * passes + summaries + gathered
    return Footprint(
        int(sum(weights.device.values())),
        int((kept + tail) * tokens),
        int(max(moments.values())),
        int(weights.host + offloaded * tokens),
        int(offloaded * tokens),
        {name: int(size) for name, size in weights.device.items()},
        {name: int(size) for name, size in moments.items()},
    )


def block_kept(
    model: Sizes, wide: int, checkpoint: bool, tiled: bool = False, norm: int = 2
) -> int:
    """Bytes per token that a block keeps for its backward: with checkpointing its input and
    attention's result and log-sum-exp; else also ``norm`` times the model's width for each norm
    (its input and output at the least), q, k, v, and four of the feed-forward's width (gate, up,
    gate's silu, their product), of which, where it is ``tiled``, only its input."""
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    result = q * wide + 4 * model.heads
    if checkpoint:
        return model.dim * wide + result
    each = norm * model.dim * model.block_norms // 2  # of attention's and of the feed-forward's
    ffn = model.dim if tiled else each + 4 * model.ffn_dim
    return (each + q + 2 * kv + ffn) * wide + result


def mixed_kept(
    model: Sizes, mixer: Mixing, wide: int, checkpoint: bool, tiled: bool = False, norm: int = 2
) -> int:
    """The same of a block with a state: with checkpointing its input alone, since its mixer is
    computed again."""
    if checkpoint:
        return model.dim * wide
    each = norm * model.dim * model.block_norms // 2
    ffn = model.dim if tiled else each + 4 * model.ffn_dim
    return (each + ffn) * wide + mixer.kept(wide)
