"""The best way to split a run over a machine, on paper: every legal split, or as many as fit a time
limit, and what was left out.

Splits differ in how many ranks share a sequence (cp) and split the heads (ulysses), in layout and
schedule; each is combined with the engines' settings, recomputation and offloading that make it
fit. What the user has given stays. What fits is forecast, and ranked by tokens per second.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np

from ringattn.cost.hardware import Hardware
from ringattn.cost.layer import BACKWARD, AttentionShape
from ringattn.cost.model import Setup, footprint
from ringattn.cost.step import Layer, Prediction, gib, layer_of, predict
from ringattn.make import make_plan
from ringattn.models.sizes import ModelConfig
from ringattn.planning.head_split import legal_degrees
from ringattn.planning.layer_plans import LayerPlans
from ringattn.planning.layouts import Layout
from ringattn.planning.masks import Mask
from ringattn.planning.schedules import BUILDERS
from ringattn.strategy import carried, layout_of
from ringattn.training.engines import ENGINES, EngineSettings
from ringattn.training.forecast import Forecast, node_of, setup_of
from ringattn.training.run import TrainingRun, with_keys

_TILE = 8192  # tokens of the feed-forward at a time, where it is tiled
_CHUNK = 2048  # tokens of the loss at a time
# The first to be tried: a time limit then costs what is seldom best.
_LAYOUTS = ("zigzag", "contiguous", "striped", "balanced")
_SCHEDULES = sorted(BUILDERS, key=lambda name: name == "double_ring")


@dataclass(frozen=True)
class Split:
    """A run that is split in one way, and its optimizer step in time."""

    run: TrainingRun
    step: Prediction


@dataclass(frozen=True)
class Answer:
    """``ranked``: what fits, fastest first, the best memory settings of each split. ``stopped``:
    why others do not run, by cp. ``slower``: splits that cannot be faster than another one
    of their cp, since their kernels alone take longer. ``untried``: those that the time limit left
    out, by cp. ``longest``: tokens of the longest sequence that any split holds, and that run."""

    ranked: list[Split]
    stopped: dict[int, str]
    slower: int
    untried: dict[int, int]
    longest: int
    longest_run: TrainingRun | None


def search(
    run: TrainingRun,
    world: int,
    hardware: Hardware,
    fixed: frozenset[str] = frozenset(),
    sequences: int | None = None,
    seconds: float = 0.6,
) -> Answer:
    """Splits ``run`` over ``world`` ranks of ``hardware``.

    ``given``: keys that stay as they are in ``run``. ``sequences``: of an optimizer step, by
    accumulation; None: train.grad_accum stays. ``seconds``: of trying. Raises ValueError where no
    split is legal at all.
    """
    return _Search(run, world, hardware, fixed, sequences).answer(seconds)


@dataclass(frozen=True)
class _Search:
    run: TrainingRun
    world: int
    hardware: Hardware
    fixed: frozenset[str]
    sequences: int | None

    def answer(self, seconds: float) -> Answer:
        stopped: dict[int, str] = {}
        ranked: list[Split] = []
        fits = {cp: f for cp in self.degrees if (f := self._fitting(cp, stopped))}
        untried = {}
        slower, end = 0, time.monotonic() + seconds
        best: dict[int, float] = dict.fromkeys(fits, 0.0)  # tokens/s by cp
        for cp, ulysses, layout, names in self._places(fits):
            if time.monotonic() > end:
                untried[cp] = untried.get(cp, 0) + len(names)
                continue
            bound = self._bound(cp, ulysses, layout, fits[cp][ulysses])
            for name in names:
                if bound <= best[cp]:
                    slower += 1
                elif time.monotonic() > end:
                    untried[cp] = untried.get(cp, 0) + 1
                elif fastest := self._best(cp, ulysses, layout, name, fits[cp][ulysses]):
                    ranked.append(fastest)
                    best[cp] = max(best[cp], fastest.step.tokens_per_s)
        for cp in fits:
            if not best[cp] and cp not in untried:
                stopped[cp] = "does not fit once the blocks on their way are counted"
        ranked.sort(key=lambda split: -split.step.tokens_per_s)
        return Answer(ranked, stopped, slower, untried, *self._longest())

    @cached_property
    def degrees(self) -> list[int]:
        """The values of cp."""
        degrees = [cp for cp in range(1, self.world + 1) if self.world % cp == 0]
        if "parallel.cp" in self.fixed:
            degrees = [cp for cp in degrees if cp == self.run.parallel.cp]
        if not degrees:
            raise ValueError(
                f"parallel.cp={self.run.parallel.cp} does not divide {self.world} ranks"
            )
        if self.sequences is not None:
            batch = self.run.batch_size
            legal = [cp for cp in degrees if self.sequences % (self.world // cp * batch) == 0]
            if not legal:
                raise ValueError(
                    f"sequences={self.sequences}: {self.world} ranks make groups of "
                    f"{', '.join(map(str, degrees))} ranks with {batch} sequences each, whose "
                    "number must divide it"
                )
            degrees = legal
        return degrees

    @cached_property
    def masks(self) -> dict[str, Mask]:
        run = self.run
        return run.attention.masks([run.seq_len] * run.batch_size, run.seq_len)

    @cached_property
    def states(self) -> dict[str, list[int]]:
        run = self.run
        return run.attention.states([run.seq_len] * run.batch_size, run.seq_len)

    @cached_property
    def model(self) -> ModelConfig:
        return self.run.sizes

    @cached_property
    def layers(self) -> tuple[str, ...]:
        return self.run.attention.layers(self.run.model.layers)

    def _plans(self, layout: Layout, schedule: str, ulysses: int, cp: int) -> LayerPlans:
        node = node_of(self.hardware, cp, self.world)
        plans = {
            kind: make_plan(mask, layout, schedule, ulysses, node_size=node)
            for kind, mask in self.masks.items()
        }
        kv_heads, sets = self.run.model.kv_heads, self.run.attention.sets
        segments, sets = carried(self.states, layout, sets, lambda _: ulysses, kv_heads)
        return LayerPlans(plans, self.layers, segments=segments, sets=sets)

    @cached_property
    def _layouts(self) -> dict[tuple[str, int], Layout]:
        return {}

    def _layout(self, name: str, cp: int) -> Layout:
        if (name, cp) not in self._layouts:
            self._layouts[name, cp] = layout_of(
                name, self.masks, self.layers, self.states, cp, self.run.attention.sets
            )
        return self._layouts[name, cp]

    def _places(
        self, fits: dict[int, dict[int, list[TrainingRun]]]
    ) -> Iterator[tuple[int, int, Layout, list[str]]]:
        """(cp, ulysses, layout, schedules): the usual layout of all first."""
        names = self._allowed("parallel.layout", _LAYOUTS)
        if self.states:  # which a striped layout cannot carry
            names = [name for name in names if name != "striped"]
        for name in names:
            for cp, runs in fits.items():
                for ulysses in runs:
                    if ulysses == cp and name != names[0]:
                        continue  # every rank sees the whole sequence: all the same
                    yield cp, ulysses, self._layout(name, cp), self._schedules(cp, ulysses)

    def _schedules(self, cp: int, ulysses: int) -> list[str]:
        if cp == ulysses or not self.masks:  # nothing to be scheduled
            return self._allowed("parallel.schedule", ("ring",))
        node = node_of(self.hardware, cp, self.world)
        names = [name for name in _SCHEDULES if name != "double_ring" or ulysses < node < cp]
        return self._allowed("parallel.schedule", names)

    def _allowed(self, key: str, names: tuple[str, ...] | list[str]) -> list[str]:
        own = getattr(self.run.parallel, key.split(".")[1])
        return [own] if key in self.fixed and own != "auto" else list(names)

    def _ulysses(self, cp: int) -> list[int]:
        node = node_of(self.hardware, cp, self.world)
        degrees = [
            u for u in legal_degrees(cp, self.run.model.heads) if node % u == 0 or u % node == 0
        ]
        if not self.masks:
            degrees = [1]
        own = self.run.parallel.ulysses
        return [u for u in degrees if u == own] if "parallel.ulysses" in self.fixed else degrees

    def _runs(self, cp: int, ulysses: int) -> Iterator[TrainingRun]:
        """The run with every choice of engine and memory, the cheapest in time first."""
        dp = self.world // cp
        node = node_of(self.hardware, cp, self.world)
        parallel = {"cp": cp, "ulysses": ulysses, "node_size": node}
        train = {}
        if self.sequences is not None:
            train = {"grad_accum": self.sequences // dp // self.run.batch_size}
        base = with_keys(self.run, parallel=parallel, train=train)
        for memory in self._memories():
            for engine in self._engines(cp):
                yield replace(base, memory=memory, engine=engine)

    def _memories(self) -> Iterator[object]:
        seen = []
        for keys in (
            {},
            {"checkpoint": True},
            {"checkpoint": True, "ffn_tile": _TILE},
            {"checkpoint": True, "offload": True},
            {"checkpoint": True, "ffn_tile": _TILE, "offload": True},
        ):
            usual = {"checkpoint": False, "ffn_tile": None, "offload": False, "loss_chunk": _CHUNK}
            own = {k: v for k, v in (usual | keys).items() if f"memory.{k}" not in self.fixed}
            try:
                memory = replace(self.run.memory, **own)
            except ValueError:  # with what is given, this is not legal
                continue
            if memory not in seen:
                seen.append(memory)
                yield memory

    def _engines(self, cp: int) -> Iterator[EngineSettings]:
        own = self.run.engine
        for kind in ENGINES:
            for engine in kind.choices():
                if engine.shard == "context" and not 1 < cp < self.world:
                    continue  # as over the world, or not at all
                keys = [f.name for f in fields(engine) if f"engine.{f.name}" in self.fixed]
                if all(getattr(engine, key) == getattr(own, key, None) for key in keys):
                    yield engine

    def _fitting(self, cp: int, stopped: dict[int, str]) -> dict[int, list[TrainingRun]]:
        """By ulysses degree: the runs that fit; why none does goes to ``stopped``."""
        fits: dict[int, list[TrainingRun]] = {}
        least: tuple[float, float] | None = None
        for ulysses in self._ulysses(cp):
            for run in self._runs(cp, ulysses):
                need = self._memory_shares(run, self.run.seq_len)
                least = need if least is None else min(least, need, key=max)
                if max(need) <= 1:
                    fits.setdefault(ulysses, []).append(run)
        if least is None:
            stopped[cp] = "no legal split with what was given"
        elif not fits:
            device, host = least
            what, need, have = "device", device, self.hardware.memory
            if host > device:
                what, need, have = "host", host, self.hardware.host_memory
            stopped[cp] = (
                f"at the least {gib(need * have)} of {gib(have)} {what} memory, with everything "
                "that can be computed again or offloaded"
            )
        return fits

    def _forecast(self, run: TrainingRun, plans: LayerPlans) -> Forecast:
        return Forecast(run, self.world, plans, self.hardware, self._device)

    def _memory_shares(self, run: TrainingRun, seq_len: int) -> tuple[float, float]:
        """(device, host) bytes, each over what the machine has, with two blocks on their way."""
        hardware, cp, ulysses = self.hardware, run.parallel.cp, run.parallel.ulysses
        tokens = -(-seq_len * run.batch_size // cp)
        block = 0 if cp == 1 else tokens * ulysses
        setup = self._setup(run)
        memory = footprint(self.model, setup, tokens, 2 * block, 3 * block)
        shared = hardware.sharing(self.world)
        device = memory.device * hardware.resident + hardware.framework
        device *= shared / hardware.memory
        return device, memory.host * shared / hardware.host_memory

    @property
    def _device(self) -> str:
        return "cuda" if self.hardware.cores is None else "cpu"

    def _setup(self, run: TrainingRun, schedule: str = "ring", layout: str = "zigzag") -> Setup:
        own = run.parallel
        return setup_of(run, self.world, own.cp, own.ulysses, schedule, layout, self._device)

    def _bound(self, cp: int, ulysses: int, layout: Layout, runs: list[TrainingRun]) -> float:
        """Tokens/s that no schedule of this layout can pass: nothing is exposed, and the rank with
        most pairs computes them as fast as its best blocks."""
        model, hardware = self.model, self.hardware
        plans = self._plans(layout, "ring", ulysses, cp)
        wide = self._setup(runs[0]).wide
        shape = AttentionShape(model.heads, model.kv_heads, model.head_dim, itemsize=wide)
        work = sum(
            count * plans[kind].partition.pairs_per_rank for kind, count in plans.counts.items()
        )
        pairs = float(np.max(work)) / ulysses / len(plans.layers)
        flops = pairs * shape.pair_flops()
        peak = hardware.flops(self.run.precision)
        forward, backward = (
            factor * flops * (1 + kernel.softmax / shape.dims)
            / (peak * max(y for _, y in kernel.efficiency.points))
            for factor, kernel in ((1, hardware.forward), (BACKWARD, hardware.backward))
        )  # fmt: skip
        tokens = max(layout.count(rank) for rank in layout.ranks)
        layer = Layer(forward + backward, 0.0, tokens, 0, 0)
        steps = (predict(model, self._setup(run), plans, hardware, layer=layer) for run in runs)
        return max(step.tokens_per_s for step in steps)

    def _best(
        self, cp: int, ulysses: int, layout: Layout, schedule: str, runs: list[TrainingRun]
    ) -> Split | None:
        """The fastest of ``runs`` that fits with this layout and schedule."""
        model, hardware = self.model, self.hardware
        plans = self._plans(layout, schedule, ulysses, cp)
        first = self._forecast(runs[0], plans)
        layer = layer_of(model, first.setup, plans, hardware, first.ranks)
        fitting = []
        for run in runs:
            setup = self._setup(run, schedule, layout.name)
            step = predict(model, setup, plans, hardware, layer=layer)
            if step.misfit is None:
                fitting.append((run, step))
        if not fitting:
            return None
        run, step = max(fitting, key=lambda pair: pair[1].tokens_per_s)
        return Split(with_keys(run, parallel={"schedule": schedule, "layout": layout.name}), step)

    def _longest(self) -> tuple[int, TrainingRun | None]:
        """The longest sequence whose memory fits, to 1 %, over all ranks, and its run."""
        runs = [run for cp in reversed(self.degrees) for u in self._ulysses(cp)
                for run in self._runs(cp, u)]  # fmt: skip

        def holds(seq_len: int) -> TrainingRun | None:
            return next((run for run in runs if max(self._memory_shares(run, seq_len)) <= 1), None)

        low, best = 0, None
        high = 1024
        while (fitting := holds(high)) and high < 2**40:
            low, best, high = high, fitting, 2 * high
        while high - low > max(1, low // 100):
            middle = (low + high) // 2
            fitting = holds(middle)
            low, high, best = (middle, high, fitting) if fitting else (low, middle, best)
        return low, best
