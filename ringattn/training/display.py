"""What a person sees on rank 0: the resolved plan, progress, the summary."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ringattn import cost
from ringattn.cost import Hardware, Shape
from ringattn.cost.model import footprint, step_flops
from ringattn.models.decoder import ModelConfig
from ringattn.plan import Plan
from ringattn.training.forecast import forecast, setup_of


def plan_table(
    config: DictConfig,
    model: ModelConfig,
    plan: Plan,
    world: int,
    where: tuple[str, str],
    peak: float | None,
    measure: str = "peak_flops",
    hardware: Hardware | None = None,
) -> Table:
    """The resolved plan of a batch. ``where``: names of device and kernel. ``peak`` is the FLOP/s
    of a rank that MFU divides by, None if it is not known; ``measure``: where it comes from.
    ``hardware``: what the step is predicted for, if any.
    """
    cp = config.parallel.cp
    dp, ranks, (device, kernel) = world // cp, range(cp), where
    wide = 2 if config.precision == "bf16" else 4
    shape = Shape(model.heads, model.kv_heads, model.head_dim, itemsize=wide)
    received = [cost.received(plan, rank, shape) for rank in ranks]
    forward = max(bytes_.forward for bytes_ in received)
    backward = max(bytes_.backward for bytes_ in received)
    micro = config.seq_len * config.batch_size * dp
    tokens = micro * config.train.grad_accum
    local = max(plan.layout.count(rank) for rank in ranks)
    kind = "cpu" if device == "cpu" else "cuda"
    rows = [cost.buffers(plan.rank(rank)) for rank in ranks]
    memory = footprint(
        model, setup_of(config, world, plan, kind), local, max(r.kv for r in rows),
        max(r.grads for r in rows),
    )  # fmt: skip
    ahead = forecast(config, model, plan, world, hardware, kind)
    flops = step_flops(model, micro, plan.mask.area * dp) * config.train.grad_accum
    table = Table(title="resolved plan", show_header=False, title_justify="left")
    for name, value in (
        ("model", f"{model.parameters:,} parameters, {model.layers} layers, {config.precision}"),
        ("mesh", f"data {dp} x context {cp}, {device}"),
        ("mask", ", ".join(f"{key} {value}" for key, value in config.attention.items())),
        ("attention", f"schedule {plan.schedule}, ulysses {plan.ulysses}, "
                      f"layout {plan.layout.name}, kernel {kernel}"),
        *([("chosen", plan.reason)] if plan.reason else []),
        ("engine", f"{config.engine.name}, ZeRO {config.engine.zero_stage}"),
        ("memory", ", ".join(f"{key} {value}" for key, value in config.memory.items())),
        ("tokens per step", f"{tokens:,} ({local:,} per rank and micro-step)"),
        ("pairs per layer", f"{plan.mask.area:,}, largest rank / mean {plan.imbalance:.3f}"),
        ("received per layer", f"forward {_bytes(forward)}, backward {_bytes(backward)} per rank"),
        ("predicted memory", f"{_bytes(memory.device)} per rank: states {_bytes(memory.states)}, "
                             f"kept {_bytes(memory.kept)}, working {_bytes(memory.working)}"
                             + (f"; {_bytes(memory.host)} in host memory" if memory.host else "")),
        ("FLOPs per step", f"{flops:.3g}: 6 x matmul parameters x tokens + 12 x pairs x heads x "
                           "head_dim per layer"),
        *([("mfu", f"over {peak / 1e9:,.1f} GFLOP/s per rank"
                   f" ({measure})")]
          if peak else []),
        *([("predicted step", f"{ahead.seconds:.3g} s ({ahead.hardware.name}): "
            + ", ".join(f"{part} {took / ahead.seconds:.0%}" for part, took in ahead.parts.items()
                        if took > 0.005 * ahead.seconds))] if ahead else []),
    ):  # fmt: skip
        table.add_row(name, value)
    return table


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
