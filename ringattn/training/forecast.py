"""What a run is expected to take, before it begins: one forecast of the typed run and its plan,
which the display, the facts file, the memory limit and ``ringattn estimate`` read. No torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from ringattn import cost
from ringattn.cost import AttentionShape, Bytes, Hardware
from ringattn.cost.model import Footprint, Setup, footprint, step_flops
from ringattn.cost.step import Prediction, again_of, predict, received_states_of, summaries_of
from ringattn.planning.layer_plans import LayerPlans
from ringattn.planning.plan import Plan
from ringattn.planning.state_exchange import exchange_of
from ringattn.training.config import hardware_of
from ringattn.training.run import TrainingRun

_FEW = 8  # ranks of a sequence of which each is followed; of more, a sample


@dataclass(frozen=True)
class Forecast:
    """Of a run on ``world`` ranks whose micro-batches have ``plans``; ``device``: cuda or cpu.
    ``hardware``: what seconds are predicted for, if any. Of many ranks a few are followed."""

    run: TrainingRun
    world: int
    plans: LayerPlans
    hardware: Hardware | None
    device: str = "cuda"

    @property
    def setup(self) -> Setup:
        """The parts of the run that cost depends on, with what was chosen for the plans."""
        plans = self.plans
        chosen = (plans.world, plans.degree, plans.schedule, plans.layout.name)
        return setup_of(self.run, self.world, *chosen, self.device)

    @property
    def dp(self) -> int:
        """Groups of ranks with sequences of their own."""
        return self.world // self.plans.world

    @cached_property
    def ranks(self) -> list[int]:
        """Those that are followed."""
        few = self.plans.world <= _FEW or not self.plans
        return list(range(self.plans.world)) if few else cost.sample(self.plans.heaviest)

    @property
    def tokens(self) -> int:
        """Of an optimizer step, over all ranks."""
        return self.plans.layout.n * self.dp * self.run.train.grad_accum

    @cached_property
    def local_tokens(self) -> int:
        """Of the rank with most, in a micro-step."""
        return max(self.plans.layout.count(rank) for rank in self.plans.layout.ranks)

    @property
    def flops(self) -> float:
        """Of an optimizer step, as MFU counts them."""
        area = self.plans.area * self.dp * self.run.train.grad_accum
        return step_flops(self.run.sizes, self.tokens, area)

    def received(self, plan: Plan) -> Bytes:
        """Bytes that a rank receives for one attention layer of this plan, at most."""
        model = self.run.sizes
        shape = AttentionShape(
            model.heads, model.kv_heads, model.head_dim, itemsize=self.setup.wide
        )
        each = [cost.received(plan, rank, shape) for rank in self.ranks]
        return Bytes(max(x.forward for x in each), max(x.backward for x in each))

    def received_states(self, kind: str) -> Bytes:
        """The same for one layer of a kind that carries a state: its summaries and its halo."""
        return received_states_of(self.run.sizes, self.setup, self.plans, kind)

    def way(self, kind: str) -> str:
        """How its states are exchanged: see :mod:`ringattn.planning.state_exchange`."""
        sizes = self.run.sizes.mixer_of(kind).state_bytes(self.setup.wide)
        return exchange_of(self.plans.segments[kind], sizes).way if sizes else "none"

    @cached_property
    def memory(self) -> Footprint:
        """Bytes of a rank, the framework's own aside."""
        plans = [self.plans[kind] for kind in self.plans.counts]
        rows = [cost.buffers(plan.rank(rank)) for plan in plans for rank in self.ranks]
        sizes = self.run.sizes
        most = (
            max((r.kv for r in rows), default=0),
            max((r.grads for r in rows), default=0),
            summaries_of(sizes, self.setup, self.plans),
            again_of(sizes, self.setup, self.plans, self.local_tokens),
        )
        return footprint(sizes, self.setup, self.local_tokens, *most)

    @cached_property
    def step(self) -> Prediction | None:
        """The optimizer step in time; None where the hardware is not known."""
        if self.hardware is None:
            return None
        return predict(self.run.sizes, self.setup, self.plans, self.hardware, self.ranks)


def setup_of(
    run: TrainingRun,
    world: int,
    cp: int,
    ulysses: int,
    schedule: str = "ring",
    layout: str = "zigzag",
    device: str = "cuda",
) -> Setup:
    """The parts of a run that cost depends on."""
    return Setup(
        engine=run.engine,
        memory=run.memory,
        world=world,
        cp=cp,
        ulysses=ulysses,
        schedule=schedule,
        layout=layout,
        precision=run.precision,
        batch=run.batch_size,
        grad_accum=run.train.grad_accum,
        device=device,
    )


def on_paper(run: TrainingRun, world: int, hardware: Hardware | None = None) -> Forecast:
    """Of a resolved run, from its keys alone: no data is opened, so every sequence counts as one
    document, the most that a step can cost. ``hardware``: in place of the run's own. Raises
    ValueError."""
    hardware = hardware or hardware_of(run)
    texts = [run.seq_len] * run.batch_size, run.seq_len
    masks, states = run.attention.masks(*texts), run.attention.states(*texts)
    layers = run.attention.layers(run.model.layers)
    strategy = run.parallel.strategy(run.model, hardware, run.attention.sets)
    plans = strategy.plans(masks, layers, states)
    cpu = hardware is not None and hardware.cores is not None
    return Forecast(run, world, plans, hardware, "cpu" if cpu else "cuda")


def node_of(hardware: Hardware, cp: int, world: int) -> int:
    """Neighbouring ranks of a sequence with a fast link, in a world on nodes of this hardware."""
    return math.gcd(hardware.node(world), cp)
