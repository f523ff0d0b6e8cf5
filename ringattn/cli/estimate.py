"""``ringattn estimate``: memory, traffic and time of a training run, on a machine without its GPUs;
with ``--search``, of every way to split it. Needs no torch.

The keys are train.py's; ``ranks`` says how many. Data is not opened: every sequence counts as one
document, the most that a step can cost.
"""

from __future__ import annotations

import json
import re
import shlex
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ringattn import typed
from ringattn.cli.request import RequestError, count, drawable, flags_of
from ringattn.cli.tables import wide_console
from ringattn.cost.presets import USUAL, here, load
from ringattn.cost.step import Prediction
from ringattn.training import config
from ringattn.training.engines import ENGINES
from ringattn.training.forecast import Forecast, on_paper
from ringattn.training.run import TrainingRun
from ringattn.training.search import Answer, Split, search

_ROWS = 10
# Of a command line, what does not change how a run is split.
_SEARCHED = ("parallel.", "engine.", "memory.")


def _flags(parser: ArgumentParser) -> None:
    parser.add_argument("--search", action="store_true", help="try every split of the run")
    parser.add_argument(
        "--families",
        action="store_true",
        help="compare families of attention in all layers (docs/families.md)",
    )
    parser.add_argument("--sequences", type=count, metavar="N",
                        help="of an optimizer step, by accumulation (with --search)")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=0.6, metavar="S",
                        help="that --search may try for (default 0.6)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--trace", metavar="FILE", help="the (best) split's step, for Perfetto")
    parser.add_argument("--plot", metavar="FILE", help="draw the ranking (PNG, SVG)")


def command(arguments: Sequence[str]) -> int:
    """The command; 1 if nothing fits."""
    listed = (f"  {key.name:30} {key.meaning}" for key in typed.keys(TrainingRun))
    epilog = "\n".join(["keys, those of train.py (its --help says what is legal):", *listed])
    keys, options = flags_of("estimate", arguments, _flags, epilog)
    if options.plot:
        drawable(options.plot)
    if options.trace and not Path(options.trace).resolve().parent.is_dir():
        raise RequestError(f"--trace {options.trace}: no such folder")
    keys = [_expanded(key) for key in keys]
    try:
        run, fixed = run_of(keys)
        world = run.ranks or run.parallel.cp or 1
        hardware = load(_hardware(run))
        hardware.flops(run.precision)
        plain, run = run, replace(run, hardware=_hardware(run), ranks=None)
        if options.families:
            from ringattn.cli.families import compare

            return compare(keys, world, hardware, options.plot, options.json)
        if options.search:
            answer = search(run, world, hardware, fixed, options.sequences, options.seconds)
            ranked = answer.ranked
        else:
            answer = None
            ahead = as_given(run, world, hardware)
            ranked = [Split(ahead.run, ahead.step)]
    except ValueError as error:  # SettingsError, HardwareError too
        raise RequestError(str(error)) from None
    if ranked and options.trace:
        from ringattn.cli.trace import write

        write(ranked[0].step, Path(options.trace))
    if ranked and options.plot:
        from ringattn.cli.splits_picture import draw  # matplotlib only where it is asked for

        draw(ranked, options.plot)
    if options.json:
        print(json.dumps(_facts(ranked, answer, plain, world, hardware, keys)))
    elif answer is None:
        _print_one(ahead, plain, keys)
    else:
        _print(answer, plain, world, hardware, keys)
    return 0 if ranked and (answer or not ranked[0].step.misfit) else 1


def _expanded(key: str) -> str:
    """KEY=16M is KEY=16777216."""
    name, equals, value = key.partition("=")
    return f"{name}={count(value)}" if equals and re.fullmatch(r"\d+[kKM]", value) else key


def run_of(keys: list[str]) -> tuple[TrainingRun, frozenset[str]]:
    """The run, and the keys that somebody has chosen: on the command line, or in an experiment."""
    tree = config.composed(["data.root=null", *keys])  # data is not opened
    run = typed.read(TrainingRun, tree)
    usual = typed.defaults(TrainingRun) | {"engine": typed.defaults(type(run.engine))}
    fixed = {key.split("=", 1)[0].lstrip("+~") for key in keys}
    if "engine" in fixed or type(run.engine) is not ENGINES[0]:  # not the usual one
        fixed.add("engine.name")
    for key in typed.keys(TrainingRun, tree):
        group, _, name = key.name.rpartition(".")
        if key.name.startswith(_SEARCHED):
            whole = group == "memory" and group in fixed
            if whole or tree[group][name] != usual[group].get(name):
                fixed.add(key.name)
    return run, frozenset(fixed)


def _hardware(run: TrainingRun) -> str:
    """The description that counts."""
    if run.hardware in (None, "auto"):
        return "this" if run.hardware == "auto" and here().exists() else USUAL
    return run.hardware


def as_given(run: TrainingRun, world: int, hardware: Any) -> Forecast:
    """The forecast of the run as it stands, on nodes of the hardware."""
    nodes = run if run.parallel.node_size else None
    resolved = config.resolved(run, world, hardware.node(world) if nodes is None else None)
    return on_paper(resolved, world, hardware)


def train_command(
    split: TrainingRun, plain: TrainingRun, world: int, node: int, keys: list[str]
) -> str:
    """The command that trains ``split``: the keys that were given, which alone say ``plain``, and
    what else was chosen."""
    nodes = f"--nnodes {world // node} " if world > node and world % node == 0 else ""
    chosen = []
    for group in ("parallel", "engine", "memory", "train"):
        before, after = asdict(getattr(plain, group)), asdict(getattr(split, group))
        if group == "engine" and before["name"] != after["name"]:
            chosen.append(f"engine={after['name']}")
            before = asdict(type(split.engine)())
        chosen += [
            f"{group}.{name}={_plain(value)}"
            for name, value in after.items()
            if value != before[name]
        ]
    if plain.hardware != split.hardware:
        chosen.append(f"hardware={split.hardware}")
    names = {key.split("=", 1)[0] for key in chosen}
    kept = [key for key in keys if key.split("=", 1)[0] not in {*names, "ranks"}]
    each = min(world, node)
    words = " ".join(shlex.quote(key) for key in (*kept, *chosen))
    return f"torchrun {nodes}--nproc-per-node {each} train.py {words}"


def _plain(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def memory_words(run: TrainingRun) -> str:
    """Engine and memory settings in a few words."""
    engine, memory = run.engine, run.memory
    words = ["FSDP" if engine.name == "fsdp" else f"ZeRO {engine.zero_stage}"]
    words += ["per sequence"] if engine.shard == "context" else []
    words += ["checkpoint"] if memory.checkpoint else []
    words += ["offload"] if memory.offload else []
    words += ["states on host"] if engine.on_host else []
    return " + ".join(words)


def _row(split: Split, plain: TrainingRun, keys: list[str]) -> dict[str, Any]:
    s, node = split.step.setup, split.step.hardware.node(split.step.setup.world)
    return {
        "cp": s.cp,
        "dp": s.world // s.cp,
        "ulysses": s.ulysses,
        "schedule": s.schedule,
        "layout": s.layout,
        "engine": asdict(s.engine),
        "memory_keys": asdict(s.memory),
        "grad_accum": s.grad_accum,
        "misfit": split.step.misfit,
        "command": train_command(split.run, plain, s.world, node, keys),
        **split.step.as_dict(),
    }


def _facts(
    ranked: list[Split],
    answer: Answer | None,
    run: TrainingRun,
    world: int,
    hardware: Any,
    keys: list[str],
) -> dict[str, Any]:
    facts = {
        "seq_len": run.seq_len,
        "ranks": world,
        "hardware": hardware.name,
        "source": hardware.source,
        "parameters": run.sizes.parameters,
        "ranked": [_row(split, run, keys) for split in ranked],
    }
    if answer is None:
        return facts
    return facts | {
        "stopped": {str(cp): why for cp, why in answer.stopped.items()},
        "slower": answer.slower,
        "untried": {str(cp): number for cp, number in answer.untried.items()},
        "longest_seq_len": answer.longest,
        "why": why(answer) if answer.ranked else None,
    }


def why(answer: Answer) -> str:
    """What the best split spends its time on, and what others lose."""
    best = answer.ranked[0].step
    shares = sorted(best.parts.items(), key=lambda item: -item[1])
    words = [f"{name} {took / best.seconds:.1%}" for name, took in shares
             if took > 0.0005 * best.seconds]  # fmt: skip
    text = f"of the first one's step, {', '.join(words)}"
    last = answer.ranked[-1].step
    behind = 1 - last.tokens_per_s / best.tokens_per_s
    if behind < 0.01:
        return f"{text}; all that fit are within {behind:.1%}, so take what suits your memory"
    seen = {_split(best)}
    for other in (split.step for split in answer.ranked[1:]):
        behind = 1 - other.tokens_per_s / best.tokens_per_s
        if _split(other) in seen or behind < 0.01 or len(seen) > 3:
            continue
        seen.add(_split(other))
        lost = {name: took / other.tokens - best.parts[name] / best.tokens
                for name, took in other.parts.items()}  # fmt: skip
        worst = max(lost, key=lost.__getitem__)
        text += f"; {_split(other)} is {behind:.1%} slower, mostly by {worst}"
    return text


def _split(p: Prediction) -> str:
    return f"cp={p.setup.cp} {p.setup.schedule} {p.setup.layout}"


def _print_one(ahead: Forecast, plain: TrainingRun, keys: list[str]) -> None:

    from ringattn.training.observing.display import plan_table

    console = wide_console()
    peak = ahead.hardware.flops(ahead.run.precision)
    console.print(plan_table(ahead, ahead.run.kernel, peak, f"peak of {ahead.hardware.name}"))
    if ahead.step.misfit:
        console.print(f"does not fit: {ahead.step.misfit}", soft_wrap=True)
        console.print("--search tries what keeps less: recomputation, offloading, other splits")
    if ahead.world > ahead.hardware.node(ahead.world):
        console.print("on each machine, with --master-addr and --node-rank (docs/operations.md):")
    console.print(
        train_command(ahead.run, plain, ahead.world, ahead.hardware.node(ahead.world), keys),
        soft_wrap=True, markup=False,
    )  # fmt: skip


def _print(answer: Answer, run: TrainingRun, world: int, hardware: Any, keys: list[str]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    console = wide_console()
    console.print(
        f"{run.sizes.parameters / 1e9:.2f} B parameters, {run.seq_len:,} tokens a sequence, "
        f"{world} x {hardware.name} ({hardware.source})",
        soft_wrap=True,
    )
    if answer.ranked:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1))
        for title in ("cp x dp", "split", "step s", "tokens/s", "MFU", "exposed", "GiB", "memory"):
            side = "left" if title in ("split", "memory") else "right"
            table.add_column(title, justify=side, no_wrap=True)
        for split in answer.ranked[:_ROWS]:
            p, s = split.step, split.step.setup
            table.add_row(
                f"{s.cp} x {s.world // s.cp}", f"{s.schedule} {s.layout} u{s.ulysses}",
                f"{p.seconds:,.1f}", f"{p.tokens_per_s:,.0f}", f"{p.mfu:.1%}",
                f"{p.exposed / p.seconds:.1%}", f"{p.peak_memory / 2**30:.1f}",
                memory_words(split.run),
            )  # fmt: skip
        console.print(table)
        more = len(answer.ranked) - _ROWS
        if more > 0:
            console.print(f"and {more} more that fit (--json has all)")
        console.print(f"why: {why(answer)}", soft_wrap=True)
    for cp, reason in answer.stopped.items():
        console.print(f"cp={cp}: {reason}", soft_wrap=True)
    if answer.slower:
        console.print(
            f"{answer.slower} not followed: their kernels alone take longer than a whole step of "
            "another split of their cp"
        )
    if answer.untried:
        left = ", ".join(f"{number} of cp={cp}" for cp, number in answer.untried.items())
        console.print(f"not tried in time: {left} (--seconds 60 tries more)", soft_wrap=True)
    if answer.longest_run:
        longest = answer.longest_run
        console.print(
            f"longest sequence that fits these ranks: {answer.longest:,} tokens (cp "
            f"{longest.parallel.cp}, {memory_words(longest)})"
        )
    if not answer.ranked:
        console.print("nothing fits: give more ranks, or a shorter seq_len")
        return
    console.print(
        train_command(answer.ranked[0].run, run, world, hardware.node(world), keys),
        soft_wrap=True, markup=False,
    )  # fmt: skip
    console.print(
        "A step has batch_size sequences per group of cp ranks and micro-step. MFU: 6 FLOPs per "
        "matmul parameter and token plus 12 x pairs x heads x head_dim per layer, over "
        f"{hardware.flops(run.precision) / 1e12:,.4g} TFLOP/s a rank. Exposed: waiting for "
        "attention's exchanges.",
        soft_wrap=True,
    )
