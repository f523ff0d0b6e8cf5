"""What a person sees on rank 0: the resolved plan, progress, the summary."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ringattn.models.mixer_config import Mixer
from ringattn.planning.layer_plans import NONE, LayerPlans
from ringattn.training.fits import beyond
from ringattn.training.forecast import Forecast

_TEXTS = {"documents": "document", "causal": "sequence"}


def plan_table(
    ahead: Forecast, kernel: str, peak: float | None = None, measure: str = "peak_flops"
) -> Table:
    """The resolved plan of a batch. ``peak`` is the FLOP/s of a rank that MFU divides by, None if
    it is not known; ``measure``: where it comes from."""
    run, plans, memory, step = ahead.run, ahead.plans, ahead.memory, ahead.step
    model, texts = run.sizes, run.attention.texts
    lora = model.trained < model.parameters
    table = Table(title="resolved plan", show_header=False, title_justify="left")
    for name, value in (
        ("model", f"{model.parameters:,} parameters, {model.layers} layers, {run.precision}"
                  + (f", of which {model.trained:,} are trained" if lora else "")),
        *([("length", longer)] if (longer := beyond(run)) else []),
        ("optimizer",
         f"{run.train.steps:,} steps of {ahead.tokens // run.seq_len:,} x {run.seq_len:,} tokens, "
         f"learning rate {run.optim.lr:g} after {run.optim.warmup_tokens:,} tokens"),
        ("mesh", f"data {ahead.dp} x context {plans.world}, {ahead.device}"),
        *((f"mask{_of(plans, kind)}",
           f"of each {_TEXTS[run.attention.name]}: {text}")
          for kind, text in texts.items() if text != "none"),
        *([("without attention", f"{bare} of {len(plans.layers)} layers")]
          if (bare := plans.layers.count(NONE)) else []),
        *((f"mixer, {plans.states[kind]} {kind}", _mixer(model.mixer_of(kind)))
          for kind in plans.segments),
        *((f"sets of keys, {plans.layers.count(kind)} {kind}",
           f"{model.sets_of(kind).mixer}: {own.blocks}; {', '.join(own.plans)}")
          for kind, own in plans.sets.items()),
        ("attention", f"schedule {plans.schedule}, ulysses {plans.ulysses}, "
                      f"layout {plans.layout.name}, kernel {kernel}"),
        *([("chosen", plans.reason)] if plans.reason else []),
        ("engine", f"{run.engine.name}, ZeRO {run.engine.zero_stage}"),
        ("memory", ", ".join(f"{key} {value}" for key, value in asdict(run.memory).items())),
        ("tokens per step",
         f"{ahead.tokens:,} ({ahead.local_tokens:,} per rank and micro-step)"),
        *((f"pairs per layer{_of(plans, kind)}",
           f"{plan.mask.area:,}, largest rank / mean {plan.imbalance:.3f}")
          for kind, plan in plans.items()),
        *([("work of all layers", f"largest rank / mean {plans.imbalance:.3f}")]
          if len(plans) > 1 else []),
        *((f"received per layer{_of(plans, kind)}", f"forward {_bytes(received.forward)}, "
                               f"backward {_bytes(received.backward)} per rank")
          for kind, received in ((kind, ahead.received(plan)) for kind, plan in plans.items())),
        *((f"received per layer, {plans.states[kind]} {kind}",
           f"forward {_bytes(received.forward)}, backward {_bytes(received.backward)} per rank "
           f"(states of {len(plans.segments[kind].all)} segments: {ahead.way(kind)}; halos)")
          for kind, received in ((kind, ahead.received_states(kind)) for kind in plans.segments)),
        ("predicted memory", f"{_bytes(memory.device)} per rank: states {_bytes(memory.states)}, "
                             f"kept {_bytes(memory.kept)}, working {_bytes(memory.working)}"
                             + (f"; {_bytes(memory.host)} in host memory" if memory.host else "")),
        ("FLOPs per step", f"{ahead.flops:.3g}: 6 x matmul parameters "
                           + ("(4 x frozen ones) " if lora else "")
                           + "x tokens + 12 x pairs x heads x head_dim per layer"
                           + (" + 3 x those of states" if plans.segments else "")),
        *([("mfu", f"over {peak / 1e9:,.1f} GFLOP/s per rank"
                   f" ({measure})")]
          if peak else []),
        *([("predicted step", f"{step.seconds:.3g} s ({step.hardware.name}): "
            + ", ".join(f"{part} {took / step.seconds:.0%}" for part, took in step.parts.items()
                        if took > 0.005 * step.seconds))] if step else []),
    ):  # fmt: skip
        table.add_row(name, value)
    return table


def _of(plans: LayerPlans, kind: str) -> str:
    """Which layers, where there are several kinds."""
    several = len(plans) + len(plans.segments) > 1
    return f", {plans.counts[kind]} {kind}" if several else ""


def _mixer(mixer: Mixer) -> str:
    if mixer.mixer == "conv":
        return f"gated convolution over {mixer.conv} tokens, {mixer.channels} channels"
    return (
        f"{mixer.mixer}, {mixer.heads} states of {mixer.key_dim} x {mixer.value_dim}, "
        f"convolution over {mixer.conv} tokens"
    )


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


class Display:
    """A live bar on a terminal; elsewhere a line now and then. Silent on ranks other than 0."""

    def __init__(self, speaks: bool, steps: int, start: int) -> None:
        self.console = Console(quiet=not speaks, highlight=False)
        self.steps = steps
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s  left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not speaks or not self.console.is_terminal,
        )
        self.task = self.progress.add_task(
            "train", total=steps, completed=start, loss="-", speed="-"
        )

    def say(self, what: Any) -> None:
        # Paths must come out as they are: no markup, no wrapping.
        self.console.print(what, markup=False, soft_wrap=isinstance(what, str))

    def update(self, values: dict[str, Any]) -> None:
        step, loss, speed = (
            values["step"], f"{values['loss']:.3f}", f"{values['tokens_per_s']:,.0f}"
        )  # fmt: skip
        self.progress.update(self.task, completed=step, loss=loss, speed=speed)
        if not self.console.is_terminal and (step % max(1, self.steps // 20) == 0 or step == 1):
            left = (self.steps - step) * values["step_s"]
            self.say(f"step {step}/{self.steps}  loss {loss}  {speed} tokens/s  {left:.0f} s left")
