"""A whole training step on a machine: seconds by part, what exchanges leave exposed, tokens/s, MFU.

A step is the sum of its parts; within attention, exchanges run behind kernels as the timeline says;
what an engine gathers and reduces layer by layer hides behind the matrix products, and offloading
behind everything that computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ringattn import cost
from ringattn.cost.hardware import Hardware
from ringattn.cost.layer import BACKWARD, AttentionShape, Bytes
from ringattn.cost.model import (
    Footprint,
    Setup,
    Sizes,
    elementwise_bytes,
    footprint,
    operators,
    product_flops,
    step_flops,
)
from ringattn.cost.timeline import Timeline
from ringattn.planning.layer_plans import LayerPlans
from ringattn.planning.plan import Plan
from ringattn.planning.segments import Segments
from ringattn.planning.state_exchange import StateBytes
from ringattn.planning.state_exchange import exchange_of as exchange_between


@dataclass(frozen=True)
class Prediction:
    """Of one optimizer step whose micro-batches have ``plans``. ``parts``: seconds of the slowest
    rank; ``tokens``: of the whole step, all ranks."""

    model: Sizes
    setup: Setup
    hardware: Hardware
    tokens: int
    parts: dict[str, float]
    memory: Footprint
    plans: LayerPlans

    @cached_property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def exposed(self) -> float:
        """Seconds in which a rank waits for exchanges of attention and of states."""
        return self.parts["exposed exchange"]

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def flops(self) -> float:
        """Model FLOPs of the step: see :func:`ringattn.cost.model.step_flops`."""
        setup = self.setup
        groups = setup.grad_accum * setup.world // setup.cp
        return step_flops(self.model, self.tokens, self.plans.area * groups)

    @property
    def mfu(self) -> float:
        """Over the hardware's peak in the run's precision, of all ranks."""
        peak = self.hardware.flops(self.setup.precision)
        return self.flops / self.seconds / peak / self.setup.world

    @property
    def peak_memory(self) -> float:
        """Bytes on a rank's device, the framework's own included."""
        return self.memory.device * self.hardware.resident + self.hardware.framework

    @property
    def misfit(self) -> str | None:
        """What is too large for the machine, in words; None if everything fits."""
        shared = self.hardware.sharing(self.setup.world)
        have = self.hardware.memory / shared
        if self.peak_memory > have:
            return (
                f"needs {gib(self.peak_memory)} of {gib(have)}: states {gib(self.memory.states)}, "
                f"kept {gib(self.memory.kept)}, working {gib(self.memory.working)}"
            )
        spare = self.hardware.host_memory / shared
        if self.memory.host > spare:
            return f"needs {gib(self.memory.host)} of {gib(spare)} host memory"
        return None

    @cached_property
    def executed(self) -> dict[str, float]:
        """FLOPs that the rank with most pairs executes, by part."""
        plans = self.plans
        tokens = max(plans.layout.count(rank) for rank in plans.layout.ranks)
        parts = product_flops(self.model, self.setup, tokens)
        pairs = sum(
            count
            * float(plans[kind].partition.pairs_per_rank.max())
            / plans[kind].ulysses
            * (1 + BACKWARD + again_in(self.setup, plans, kind))
            for kind, count in plans.counts.items()
        )
        parts["attention"] = pairs * self._shape.pair_flops()
        return {name: flops * self.setup.grad_accum for name, flops in parts.items()}

    @cached_property
    def received(self) -> dict[str, float]:
        """Bytes that a rank receives, by collective; of attention's, the last sampled rank."""
        traffic, accum = self.setup.traffic(self.model), self.setup.grad_accum
        forward = backward = 0
        for kind, count in self.plans.counts.items():
            plan = self.plans[kind]
            layer = cost.received(plan, cost.sample(plan)[-1], self._shape)
            forward += count * layer.forward * (1 + again_in(self.setup, self.plans, kind))
            backward += count * layer.backward
        states = 0
        for kind, count in self.plans.states.items():
            layer = received_states_of(self.model, self.setup, self.plans, kind)
            states += count * (layer.forward + layer.backward)
        for kind, count in self.plans.of_sets.items():
            layer, again = received_beside(self.model, self.setup, self.plans, kind), 1
            again += self.setup.memory.checkpoint
            states += count * (again * layer.forward + layer.backward)
        return {
            "attention forward": float(forward * accum),
            "attention backward": float(backward * accum),
            **({"states": float(states * accum)} if states else {}),
            "weights gathered": traffic.gathered * accum,
            "gradients reduced": traffic.reduced * accum,
            "at the step's end": traffic.at_step,
        }

    @property
    def _shape(self) -> AttentionShape:
        model = self.model
        return AttentionShape(model.heads, model.kv_heads, model.head_dim, itemsize=self.setup.wide)

    def as_dict(self) -> dict:
        """For machines: seconds and bytes."""
        return {
            "seconds": self.seconds,
            "tokens_per_s": self.tokens_per_s,
            "mfu": self.mfu,
            "exposed_s": self.exposed,
            "parts": self.parts,
            "flops": self.flops,
            "executed_flops": self.executed,
            "received_bytes": self.received,
            "peak_memory_bytes": self.peak_memory,
            "memory": {
                **self.memory.state_parts,
                "states": self.memory.states,
                "kept": self.memory.kept,
                "working": self.memory.working,
                "framework": self.hardware.framework,
                "host": self.memory.host,
            },
        }


def gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


@dataclass(frozen=True)
class Layer:
    """One attention layer on a rank, on the mean over the layers: seconds of its kernels, and those
    that its exchanges leave exposed; and the rows that one holds at most. ``tokens`` of the rank;
    ``kv_rows`` and ``grad_rows`` as in :class:`ringattn.cost.Buffers`."""

    compute: float
    exposed: float
    tokens: int
    kv_rows: int
    grad_rows: int
    states: float = 0.0  # seconds of the exchanges of all layers with a state, which nothing hides
    summaries: int = 0  # bytes that one of them holds of others
    scored: float = 0.0  # FLOPs of a forward of all layers that choose keys: of their scores
    again: int = 0  # bytes of a layer that lays queries out again, by its choices


def layer_of(
    model: Sizes, setup: Setup, plans: LayerPlans, hardware: Hardware, ranks: list[int]
) -> Layer:
    """The attention layer of the model, of the slowest and the largest of ``ranks``."""
    compute = exposed = 0.0
    held = []
    for kind, count in plans.counts.items():
        line = timeline_of(model, setup, plans[kind], hardware, ranks)
        again = again_in(setup, plans, kind)
        compute += count / len(plans.layers) * line.compute * (1 + again / (1 + BACKWARD))
        exposed += count / len(plans.layers) * line.exposed * (1 + again / 2)
        held += [cost.buffers(plans[kind].rank(rank)) for rank in ranks]
    tokens = max(plans.layout.count(rank) for rank in plans.layout.ranks)
    rows = max((r.kv for r in held), default=0), max((r.grads for r in held), default=0)
    return Layer(
        compute,
        exposed,
        tokens,
        *rows,
        states=exchange_of(model, setup, plans, hardware),
        summaries=summaries_of(model, setup, plans),
        scored=sum(
            count * 2.0 * plans.sets[kind].scored * tokens * model.heads * model.head_dim
            for kind, count in plans.of_sets.items()
        ),
        again=again_of(model, setup, plans, tokens),
    )


def again_in(setup: Setup, plans: LayerPlans, kind: str) -> int:
    """How often a forward is computed again in the backward: attention of a mask is kept, that of
    sets of keys is not."""
    return int(setup.memory.checkpoint and kind in plans.of_set)


def again_of(model: Sizes, setup: Setup, plans: LayerPlans, tokens: int) -> int:
    """The most bytes in which a layer lays the queries of so many tokens out again by what they
    chose: q and dout in the model's dtype, out and dq in float32."""
    times = max((own.relaid for own in plans.sets.values()), default=0)
    return times * tokens * model.heads * model.head_dim * 2 * (setup.wide + 4)


def received_beside(model: Sizes, setup: Setup, plans: LayerPlans, kind: str) -> Bytes:
    """What a rank receives in a layer with sets of keys besides the rows of its plans, at most:
    float32 summaries to choose from, and how many rows of every rank chose each; tokens on their
    way to another order and back, and what that order is made of; states beside the sets."""
    own, others = plans.sets[kind], (plans.world - 1) / plans.world
    summaries = own.gathered * others * model.kv_heads * model.head_dim * 4
    summaries += own.gathered * (plans.world - 1) * model.kv_heads * 4  # what each rank chose
    tokens = max(plans.layout.count(rank) for rank in plans.layout.ranks) * own.moved * others
    heads = tokens * model.heads
    summaries += own.moved * plans.layout.n * others * model.heads * 4  # buckets of all tokens
    # q, k and v there, out and its log-sum-exp back; q, out and dout there, dq, dk and dv back.
    forward = heads * (3 * model.head_dim * setup.wide + (model.head_dim + 1) * 4)
    backward = heads * (3 * model.head_dim * (setup.wide + 4) + 4)
    if own.features:
        segments = Segments(plans.layout, own.blocks.lengths)
        columns = model.head_dim + 1  # with the normaliser
        state = 4 * model.heads * own.features * columns
        token = 4 * model.heads * (2 * own.features + columns)
        sizes = StateBytes(state, 4 * model.heads, token, 4 * model.heads * columns)
        exchange = exchange_between(segments, sizes)
        there, back = zip(
            *(exchange.received(rank, sizes) for rank in ranks_of(plans)), strict=True
        )
        forward, backward = forward + max(there), backward + max(back)
    return Bytes(int(summaries + forward), int(backward))


def summaries_of(model: Sizes, setup: Setup, plans: LayerPlans) -> int:
    """The most bytes that a rank holds of others' for a layer with a state."""
    each = [received_states_of(model, setup, plans, kind) for kind in plans.segments]
    return max((max(x.forward, x.backward) for x in each), default=0)


def ranks_of(plans: LayerPlans) -> list[int]:
    """Those that are followed for layers with a state: both ends of the sequence and some between
    them."""
    return sorted({i * (plans.world - 1) // 4 for i in range(5)})


def received_states_of(model: Sizes, setup: Setup, plans: LayerPlans, kind: str) -> Bytes:
    """The most that a rank receives for one layer of a kind with a state."""
    segments, mixer = plans.segments[kind], model.mixer_of(kind)
    each = [cost.received_states(segments, r, mixer, setup.wide) for r in ranks_of(plans)]
    return Bytes(max(x.forward for x in each), max(x.backward for x in each))


def exchange_of(model: Sizes, setup: Setup, plans: LayerPlans, hardware: Hardware) -> float:
    """Seconds that the layers with a state exchange in a micro-step: their halos and summaries,
    forward and backward, again where they are computed again."""
    node = hardware.node(setup.world)
    link, together = hardware.link(plans.world > node), node if plans.world > node else 1
    again = 2 if setup.memory.checkpoint else 1
    total = 0.0
    for kind, count in plans.states.items():
        segments, mixer = plans.segments[kind], model.mixer_of(kind)
        each = []
        for rank in ranks_of(plans):
            both = cost.state_exchanges(segments, rank, mixer, setup.wide)
            forward, backward = (
                sum(float(link.seconds(x.size, x.peers, together)) for x in exchanges)
                for exchanges in both
            )
            each.append(again * forward + backward)
        total += count * max(each)
    for kind, count in plans.of_sets.items():
        layer, peers = received_beside(model, setup, plans, kind), plans.world - 1
        there, back = (float(link.seconds(x, peers, together)) if x else 0.0
                       for x in (layer.forward, layer.backward))  # fmt: skip
        total += count * (again * there + back)
    return total


def timeline_of(
    model: Sizes, setup: Setup, plan: Plan, hardware: Hardware, ranks: list[int], **options: Any
) -> Timeline:
    """A layer of one plan, of the slowest of ``ranks``: see :func:`ringattn.cost.simulate`, which
    takes the ``options``."""
    shape = AttentionShape(model.heads, model.kv_heads, model.head_dim, itemsize=setup.wide)
    # A node holds neighbouring ranks, so those of one sequence.
    node, precision = hardware.node(setup.world), setup.precision
    options |= {"together": node}
    return cost.simulate(plan, shape, hardware, precision, node, ranks, **options)


def predict(
    model: Sizes,
    setup: Setup,
    plans: LayerPlans | Plan,
    hardware: Hardware,
    ranks: list[int] | None = None,
    layer: Layer | None = None,
) -> Prediction:
    """One optimizer step whose micro-batches all have ``plans``, or one plan for all layers;
    ``ranks``: those that are followed (see :func:`ringattn.cost.simulate`), by default a sample.
    ``layer``: where it is known."""
    if isinstance(plans, Plan):
        plans = LayerPlans.alike(plans, model.layers)
    if layer is None:
        if ranks is None:
            ranks = cost.sample(plans.heaviest) if plans else []
        layer = layer_of(model, setup, plans, hardware, ranks)
    held = layer.kv_rows, layer.grad_rows, layer.summaries, layer.again
    memory = footprint(model, setup, layer.tokens, *held)
    return Prediction(
        model=model,
        setup=setup,
        hardware=hardware,
        tokens=plans.layout.n * setup.grad_accum * setup.world // setup.cp,
        parts=_parts(model, setup, hardware, layer, memory),
        memory=memory,
        plans=plans,
    )


def _parts(
    model: Sizes,
    setup: Setup,
    hardware: Hardware,
    layer: Layer,
    memory: Footprint,
) -> dict[str, float]:
    tokens = layer.tokens
    peak = hardware.flops(setup.precision)
    side = min(tokens, model.dim, model.ffn_dim)
    # Where ranks share cores, all compute slower; the timeline has that for attention already.
    slower = max(1.0, hardware.sharing(setup.world) / (hardware.cores or 1))
    share = sum(product_flops(model, setup, tokens).values()) / peak
    products = share / float(hardware.matmul(side)) * slower
    again = 2 if setup.memory.checkpoint else 1
    scores = again * layer.scored / peak / float(hardware.matmul(min(side, model.head_dim)))
    products += scores * slower
    streams = elementwise_bytes(model, setup, tokens) / hardware.memory_bandwidth
    elementwise = streams * slower
    dispatch = operators(model, setup) * hardware.dispatch * slower
    micro = {
        "matrix products": products,
        "elementwise": elementwise + dispatch,
        "attention kernel": layer.compute * model.layers,
        "exposed exchange": layer.exposed * model.layers + layer.states,
    }
    traffic = setup.traffic(model)
    link = hardware.link(setup.world > hardware.node(setup.world))
    # A ring crosses between nodes once: as fast as one rank, however many share the link.
    rate = float(link.bandwidth(2**24)) * link.collective
    within = (traffic.gathered + traffic.reduced) / rate if setup.world > 1 else 0.0
    hides = (
        link.overlap_efficiency * (products + micro["attention kernel"])
        if setup.engine.gathers
        else 0.0
    )
    micro["engine"] = max(within - hides, (1 - link.overlap_efficiency) * within, 0.0)
    moved = 2 * memory.offloaded  # to host memory and back
    busy = micro["matrix products"] + micro["attention kernel"]
    micro["offload"] = max(0.0, moved / float(hardware.host.bandwidth(2**24)) - busy)
    parts = {name: seconds * setup.grad_accum for name, seconds in micro.items()}
    bandwidth = hardware.memory_bandwidth
    if setup.engine.on_host:
        bandwidth = min(bandwidth, float(hardware.host.bandwidth(2**24)))
    parts["engine"] += traffic.at_step / rate if setup.world > 1 else 0.0
    parts["engine"] += traffic.optimizer / bandwidth * slower + hardware.step
    return parts
