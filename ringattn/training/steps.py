"""The optimizer steps of a run: data in, steps, metrics, checkpoints, evaluations, the end."""

from __future__ import annotations

import math
import time
from collections.abc import Sized
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from ringattn.context import Context, Strategy
from ringattn.cost.model import step_flops
from ringattn.data.integrity import Integrity
from ringattn.data.stream import Sequences
from ringattn.data.tokenizer import BYTES
from ringattn.execution.carriers import ProcessRank, Timed
from ringattn.training.batch import MicroBatch, load_batch, numbers
from ringattn.training.checkpoints.saver import Manifest, Saver
from ringattn.training.engines import Engine
from ringattn.training.evaluating import evaluate
from ringattn.training.evaluating.evaluate import Evaluation
from ringattn.training.job import Job
from ringattn.training.launching.limit import grace_s
from ringattn.training.observing.display import Display
from ringattn.training.observing.heartbeat import Heartbeat
from ringattn.training.observing.metrics import EVALUATIONS, MetricsLog, append, peak_memory_bytes
from ringattn.training.observing.pictures import draw
from ringattn.training.observing.profile import Profile
from ringattn.training.optimizer import Schedule
from ringattn.training.run import TrainingRun
from ringattn.training.stopping import Asking, Stop

PATIENCE_S = 10.0  # at the end, for what is read in the background

PARTS = ("exchange", "engine", "data")  # of a step, timed; the rest is "compute"


class Diverged(RuntimeError):
    """Loss or gradient were not finite too many times in a row."""


class DamagedData(RuntimeError):
    """Tokens are not what was written; raised on all ranks."""


def sequences_per_step(run: TrainingRun, context: Context) -> int:
    """Sequences of an optimizer step, over all ranks."""
    return run.batch_size * context.dp * run.train.grad_accum


def micro_batches(
    job: Job, context: Context, stream: Sequences, seen: int
) -> tuple[list[list[int]], float]:
    """The sequences of this rank's micro-steps after ``seen`` of them, and how unequal the work of
    data ranks is."""
    run = job.run
    return numbers(
        run.attention, job.model, stream, context, run.batch_size, run.train.grad_accum, seen,
        run.data.balance,
    )  # fmt: skip


@dataclass
class Steps:
    """The optimizer steps of one run on this rank."""

    job: Job
    context: Context
    engine: Engine
    stream: Sequences
    split: Strategy
    evaluation: Evaluation
    peak: float
    stops: Sized
    display: Display
    log: MetricsLog | None
    heartbeat: Heartbeat
    integrity: Integrity
    evaluate_first: bool  # what a run before has left out, at the step where this one begins
    stopping: bool = False  # the same on all ranks
    skipped: int = 0  # in a row
    seconds: float = math.inf  # of the last step, the mean of all ranks
    grace: int | None = field(default_factory=grace_s)

    def __post_init__(self) -> None:
        self.watch = self.engine.watch
        self.carrier = Timed(ProcessRank(self.context.cp_group), self.watch)
        model = getattr(self.engine.root, "module", self.engine.root)
        self.asking = Asking(self.context, self.stops, model.blocks)

    def run(self, state: Manifest, saved: bool) -> Manifest:
        """From ``state`` to the last step, or to a request to stop; ``saved``: whether the run
        directory already holds ``state``, which then is not written again."""
        run, display = self.job.run, self.display
        saver = Saver(self.job.run_dir, run.checkpoint.keep, run.checkpoint.background)
        every, at = run.checkpoint.every, state.step if saved else -1
        first, loss, began, seconds = None, None, time.perf_counter(), math.inf
        profile = Profile(run.profile.steps, self.job.run_dir, self.context.device)
        with display.progress, profile:
            if self.evaluate_first:
                self._evaluate(state.step, saver)
            while state.step < run.train.steps and not self.stopping:
                profile.before(state.step + 1)
                self.watch.read()  # forgets what lies between steps
                begin = time.perf_counter()
                self.heartbeat.where = f"step {state.step + 1}, data"
                with self.watch.section("data"):
                    batches, unequal = self._batches(state)
                area = sum(batch.plans.area for batch in batches) / self.context.cp
                supervised, area, stop, written, damaged, took = self.context.total(
                    sum(batch.supervised for batch in batches), area, len(self.stops), saver.ready,
                    bool(self.integrity.problem), seconds,
                )  # fmt: skip
                self.seconds = took / self.context.world
                if written == self.context.world:
                    saver.finish()
                if damaged:
                    saver.finish()  # what was saved before it was seen is a person's to judge
                    self._damaged(state.step)
                if stop:
                    self.stopping = True
                    break
                try:
                    with self.asking.within(self.seconds):
                        state, values = self._step(state, batches, supervised)
                except Diverged:
                    saver.finish()  # the last sound state may still be on its way
                    raise
                except Stop:
                    self.stopping = True
                    break
                seconds = time.perf_counter() - begin
                spent = self.watch.read()
                tokens = self._per_step * run.seq_len
                flops = step_flops(self.job.model, tokens, int(area))
                values |= {
                    "tokens_per_s": tokens / seconds,
                    "step_s": seconds,
                    "pairs": int(area),
                    "imbalance": unequal,
                    "compute_s": max(0.0, seconds - sum(spent.values())),
                    **{f"{name}_s": spent.get(name, 0.0) for name in PARTS},
                    "mfu": flops / seconds / (self.peak * self.context.world),
                    "peak_memory_bytes": peak_memory_bytes(self.context.device),
                }
                loss = values["loss"]
                first = first or loss
                display.update(values)
                if self.log:
                    self.log.write(values)
                self._mind_the_grace()
                last = run.eval.every and state.step == run.train.steps  # before evaluating
                if every is not None and (last or (every and state.step % every == 0)):
                    self.heartbeat.where = f"step {state.step}, checkpoint"
                    saver.save(self.engine, state)
                    at = state.step
                self._evaluate(state.step, saver)
        self.heartbeat.where = f"step {state.step}, last checkpoint"
        if at != state.step and every is not None and run.train.steps:
            saver.save(self.engine, state)
        saver.finish()
        self.heartbeat.where = f"step {state.step}, data read to its end"
        (left,) = self.context.total(self.integrity.finish(0 if self.stopping else PATIENCE_S))
        self._damaged(state.step)
        if left:
            display.say(f"{left:.0f} files of tokens have not been seen to be whole; the next run "
                        "goes on with them")  # fmt: skip
        if first is not None:
            display.say(
                f"loss {first:.3f} -> {loss:.3f}{self._bits(loss)} in "
                f"{time.perf_counter() - began:.0f} s, {state.tokens_seen:,} tokens"
            )
        return state

    def _damaged(self, step: int) -> None:
        """Raises DamagedData on all ranks if one has found something."""
        everyone = [""] * self.context.world
        dist.all_gather_object(everyone, self.integrity.problem)
        if found := next(filter(None, everyone), ""):
            raise DamagedData(
                f"{found}; found after step {step}, which may have trained on it: checkpoints of "
                "this run that are older than the damage are sound"
            )

    def _bits(self, loss: float) -> str:
        if self.job.data.tokenizer.fingerprint != BYTES:
            return ""
        return f" ({loss / math.log(2):.2f} bits per byte)"

    def _evaluate(self, step: int, saver: Saver) -> None:
        every, last = self.job.run.eval.every, self.job.run.train.steps
        if not every or (step % every and step != last):
            return
        self.heartbeat.where = f"step {step}, evaluation"

        def go_on() -> bool:
            stop, written = self.context.total(len(self.stops), saver.ready)
            if written == self.context.world:
                saver.finish()
            self.stopping = bool(stop)
            return not stop

        values = self.evaluation.run(step, go_on)
        if values is None:
            self.display.say(f"evaluation at step {step} left out: the run is to end")
            return
        self.display.say(evaluate.summary(values))
        if self.log:
            append(self.job.run_dir / EVALUATIONS, values)
            self.log.write_evaluation(values, draw(self.job.run_dir, values))

    @property
    def _per_step(self) -> int:
        return sequences_per_step(self.job.run, self.context)

    def _batches(self, state: Manifest) -> tuple[list[MicroBatch], float]:
        """(The micro-steps of a step, how unequal the work of data ranks is.)"""
        each, unequal = micro_batches(self.job, self.context, self.stream, state.sequences_seen)
        attention, layers = self.job.run.attention, self.job.model.layers
        return [
            load_batch(attention, layers, self.stream, self.context, self.split, own)
            for own in each
        ], unequal

    def _step(
        self, state: Manifest, batches: list[MicroBatch], supervised: float
    ) -> tuple[Manifest, dict[str, float]]:
        """One optimizer step; skipped, and counted, if its loss or gradient is not finite."""
        run, context, engine = self.job.run, self.context, self.engine
        accum, number = run.train.grad_accum, state.step + 1
        lr = Schedule(**state.schedule).rate(state.tokens_seen)
        engine.set_lr(lr)
        local_loss, norm, router = torch.zeros((), device=context.device), None, 0.0
        for batch in batches:
            self.heartbeat.where = f"step {number}, forward"
            loss, *more = engine.forward(
                batch.tokens,
                batch.positions,
                context.attend(batch.plans, self.carrier),
                batch.labels,
            )
            self.heartbeat.where = f"step {number}, backward"
            # A loss that is not finite may have a gradient that is: then nothing must step.
            honest = torch.where(loss.detach().isfinite(), 1.0, math.nan)
            scaled = context.scaled_loss(loss, supervised, accum)
            if len(more) > 2 and more[2] is not None:
                # A share of a mean over all ranks, of which the engine takes the mean again.
                scaled = scaled + more[2] * context.world
                router += float(more[2].detach()) / accum
            engine.backward(scaled * honest)
            local_loss += loss.detach()
            self.heartbeat.where = f"step {number}, optimizer"
            with self.watch.section("engine"):
                norm = engine.step()
        loss, router = context.total(float(local_loss) / max(supervised, 1), router)
        loss += router
        finite = math.isfinite(loss) and math.isfinite(norm)
        self.skipped = 0 if finite else self.skipped + 1
        seen = state.sequences_seen
        if self.skipped:
            ids = list(range(seen, seen + self._per_step))
            self._report_skipped(number, loss, norm, ids)
        state = replace(
            state,
            step=number,
            adam_steps=state.adam_steps + finite,
            sequences_seen=seen + self._per_step,
            tokens_seen=state.tokens_seen + self._per_step * run.seq_len,
        )
        return state, {
            "step": number,
            "loss": loss,
            **({"router_loss": router} if run.model.unchanged and router else {}),
            "grad_norm": norm,
            "lr": lr,
            "tokens_seen": state.tokens_seen,
            "supervised_tokens": int(supervised),
            "skipped_steps": number - state.adam_steps,
        }

    def _mind_the_grace(self) -> None:
        """Says, once, that a request to stop may come too late; of steps after the first, which
        takes longer."""
        silence = self.asking.silence
        if self.grace is None or self.seconds == math.inf or silence <= self.grace:
            return
        self.display.say(
            f"a request to stop may not be heard for {silence:.0f} s of a step, and torchrun kills "
            f"{self.grace} s after SIGTERM: what came after the last checkpoint would be lost; "
            f"start with torchrun --shutdown-timeout {60 * math.ceil(silence / 30)} (or "
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT), and have the scheduler wait as long"
        )
        self.grace = None

    def _report_skipped(self, step: int, loss: float, norm: float, ids: list[int]) -> None:
        """Writes down which sequences it was. Raises Diverged after too many in a row."""
        most = self.job.run.train.max_skipped
        path = self.job.run_dir / "skipped.jsonl"
        if self.log:
            line = {"step": step, "loss": str(loss), "grad_norm": str(norm), "sequences": ids}
            append(path, line)
        self.display.say(
            f"step {step} skipped: loss {loss}, gradient norm {norm}; its sequences are in "
            f"{path.name}"
        )
        if self.skipped > most:
            raise Diverged(
                f"step {step}: loss {loss}, gradient norm {norm}, {self.skipped} such steps in a "
                f"row (train.max_skipped={most}); the last was of sequences {ids[0]} to "
                f"{ids[-1]} (all in {path})"
            )
