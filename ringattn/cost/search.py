"""The best way to split a training run over a machine: every legal split is tried on paper.

Splits differ in how many ranks share a sequence (cp) and split the heads (ulysses), in schedule and
layout; each is combined with the engine stages, checkpointing and offloading that make it fit. What
fits is simulated, and ranked by tokens per second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from ringattn import cost, layouts
from ringattn.cost.hardware import Hardware
from ringattn.cost.model import Setup, Sizes, footprint
from ringattn.cost.step import Prediction, gib, layer_of, predict
from ringattn.heads import legal_degrees
from ringattn.masks import Mask
from ringattn.plan import Plan, make_plan
from ringattn.schedules import BUILDERS

_SIZES = 3  # of the values of cp that fit, as many are simulated: more ranks only exchange more
_TILE = 8192  # tokens of the feed-forward at a time, where it is tiled
_CHUNK = 2048  # tokens of the loss at a time


@dataclass(frozen=True)
class Question:
    """A run to be split. ``sequences``: of an optimizer step; None: one per group of cp ranks.
    ``mask``: of a sequence of that many tokens."""

    model: Sizes
    seq_len: int
    ranks: int
    hardware: Hardware
    mask: Callable[[int], Mask]
    precision: str = "bf16"
    sequences: int | None = None
    fixed: dict[str, object] = field(default_factory=dict)  # of Setup, given by the user


@dataclass(frozen=True)
class Answer:
    """``ranked``: what fits, fastest first, the best memory settings of each split. ``stopped``:
    why others do not run, by cp. ``longest``: tokens of the longest sequence that any split holds,
    and that split."""

    ranked: list[Prediction]
    stopped: dict[int, str]
    longest: int
    longest_setup: Setup | None


def search(question: Question) -> Answer:
    """Raises ValueError where no split is legal at all."""
    stopped: dict[int, str] = {}
    ranked: list[Prediction] = []
    sizes = 0
    for cp in _degrees(question):
        fits = _fitting(question, cp, question.seq_len, stopped)
        if not fits:
            continue
        sizes += 1
        if sizes > _SIZES:
            stopped[cp] = "fits, but fewer ranks per sequence do too and exchange less"
            continue
        found = list(_simulated(question, cp, fits))
        if not found:
            stopped[cp] = "does not fit once the blocks on their way are counted"
        ranked += found
    ranked.sort(key=lambda p: -p.tokens_per_s)
    longest, setup = _longest(question)
    return Answer(ranked, stopped, longest, setup)


def _degrees(question: Question) -> list[int]:
    ranks = question.ranks
    degrees = [cp for cp in range(1, ranks + 1) if ranks % cp == 0]
    if "cp" in question.fixed:
        degrees = [cp for cp in degrees if cp == question.fixed["cp"]]
    if question.sequences is not None:
        legal = [cp for cp in degrees if question.sequences % (ranks // cp) == 0]
        if not legal:
            raise ValueError(
                f"sequences={question.sequences}: {ranks} ranks make groups of "
                f"{', '.join(map(str, degrees))} ranks, whose number must divide it"
            )
        degrees = legal
    if not degrees:
        raise ValueError(f"cp={question.fixed['cp']} does not divide {ranks} ranks")
    return degrees


def _setups(question: Question, cp: int, ulysses: int) -> Iterator[Setup]:
    """Engine stages, checkpointing and offloading, the cheapest in time first."""
    dp = question.ranks // cp
    base = Setup(
        world=question.ranks,
        cp=cp,
        ulysses=ulysses,
        precision=question.precision,
        grad_accum=1 if question.sequences is None else question.sequences // dp,
        loss_chunk=_CHUNK,
        device="cuda" if question.hardware.cores is None else "cpu",
    )
    engines = [{"engine": "deepspeed", "zero_stage": stage} for stage in (1, 2, 3)]
    engines += [{"engine": "fsdp", "zero_stage": 3, "shard": "world"}]
    if dp > 1 and cp > 1:
        engines += [{"engine": "fsdp", "zero_stage": 3, "shard": "context"}]
    for memory in (
        {},
        {"checkpoint": True},
        {"checkpoint": True, "ffn_tile": _TILE},
        {"checkpoint": True, "offload": True},
        {"checkpoint": True, "ffn_tile": _TILE, "offload": True},
    ):
        for engine in engines:
            for states in (False, True):
                away = {}
                if states and engine["engine"] == "deepspeed":
                    away = {
                        "offload_optimizer": True,
                        "offload_params": engine["zero_stage"] == 3,
                    }
                elif states:
                    away = {"offload_params": True}
                setup = replace(base, **engine, **memory, **away)
                fixed = {k: v for k, v in question.fixed.items() if k != "cp"}
                if all(getattr(setup, name) == value for name, value in fixed.items()
                       if name not in ("schedule", "layout")):  # fmt: skip
                    yield setup


def _ulysses(question: Question, cp: int) -> list[int]:
    node = question.hardware.node_size
    return [
        u
        for u in legal_degrees(cp, question.model.heads)
        if (node % u == 0 or u % node == 0) and question.fixed.get("ulysses", u) == u
    ]


def _need(question: Question, setup: Setup, seq_len: int) -> tuple[float, float]:
    """(device, host) bytes, each over what the machine has, with two blocks on their way."""
    hardware, tokens = question.hardware, -(-seq_len // setup.cp)
    block = 0 if setup.cp == 1 else tokens * setup.ulysses
    memory = footprint(question.model, setup, tokens, 2 * block, 3 * block)
    shared = setup.world if hardware.cores is not None else 1
    device = memory.device * hardware.resident + hardware.framework
    device *= shared / hardware.memory
    return device, memory.host * shared / hardware.host_memory


def _fitting(
    question: Question, cp: int, seq_len: int, stopped: dict[int, str]
) -> dict[int, list[Setup]]:
    """By ulysses degree: the setups that fit; why none does goes to ``stopped``."""
    fits: dict[int, list[Setup]] = {}
    least = (float("inf"), 0.0)
    tried = False
    for ulysses in _ulysses(question, cp):
        for setup in _setups(question, cp, ulysses):
            tried = True
            need = _need(question, setup, seq_len)
            least = min(least, need, key=max)
            if max(need) <= 1:
                fits.setdefault(ulysses, []).append(setup)
    if not tried:
        stopped[cp] = "no legal split with what was given"
    elif not fits:
        device, host = least
        hardware = question.hardware
        what, need, have = "device", device, hardware.memory
        if host > device:
            what, need, have = "host", host, hardware.host_memory
        stopped[cp] = (
            f"at the least {gib(need * have)} of {gib(have)} {what} memory, with everything that "
            "can be computed again or offloaded"
        )
    return fits


def _simulated(question: Question, cp: int, fits: dict[int, list[Setup]]) -> Iterator[Prediction]:
    """The fastest setup of every ulysses degree, schedule and layout."""
    mask = question.mask(question.seq_len)
    for ulysses, setups in fits.items():
        for plan in _plans(question, mask, cp, ulysses):
            model, hardware, ranks = question.model, question.hardware, cost.sample(plan)
            layer = layer_of(model, setups[0], plan, hardware, ranks)
            names = {"schedule": plan.schedule, "layout": plan.layout.name}
            some = (
                predict(model, replace(setup, **names), plan, hardware, layer=layer)
                for setup in setups
            )
            best = max(
                (p for p in some if p.misfit is None), key=lambda p: p.tokens_per_s, default=None
            )
            if best:
                yield best


def _plans(question: Question, mask: Mask, cp: int, ulysses: int) -> Iterator[Plan]:
    node = question.hardware.node_size
    node_size = node if cp % node == 0 else cp
    names = ["ring"] if cp == ulysses else [
        name for name in BUILDERS
        if name != "double_ring" or (node_size < cp and node_size > ulysses)
    ]  # fmt: skip
    for layout in _layouts(question, mask, cp):
        for name in names:
            if question.fixed.get("schedule", name) == name:
                yield make_plan(mask, layout, name, ulysses, node_size=node_size)


def _layouts(question: Question, mask: Mask, cp: int) -> list[layouts.Layout]:
    """The layouts whose largest work is within a tenth of the best one's."""
    wanted = question.fixed.get("layout")
    names = [wanted] if wanted else ["zigzag", "contiguous"]
    found = [layouts.build(str(name), mask, cp) for name in names]
    spread = [make_plan(mask, layout, "ring").imbalance for layout in found]
    if not wanted and min(spread) > 1.1 and cp <= 64:
        found.append(layouts.balanced(mask, cp))
        spread.append(make_plan(mask, found[-1], "ring").imbalance)
    return [
        layout
        for layout, value in zip(found, spread, strict=True)
        if value <= 1.1 * min(spread)
    ][: 1 if cp == 1 else None]  # fmt: skip


def _longest(question: Question) -> tuple[int, Setup | None]:
    """The longest sequence whose memory fits, to 1 %, over all ranks, and its setup."""

    def holds(seq_len: int) -> Setup | None:
        for cp in reversed(_degrees(question)):
            for setups in _fitting(question, cp, seq_len, {}).values():
                return setups[0]
        return None

    low, best = 0, None
    high = 1024
    while (setup := holds(high)) and high < 2**40:
        low, best, high = high, setup, 2 * high
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        setup = holds(middle)
        low, high, best = (middle, high, setup) if setup else (low, middle, best)
    return low, best
