"""The training loop: data in, optimizer steps, metrics, checkpoints, a sample at the end."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ringattn.context import Context, Strategy, check_engaged, check_same_data
from ringattn.cost.model import step_flops
from ringattn.data.integrity import Integrity
from ringattn.data.stream import Sequences
from ringattn.data.tokenizer import BYTES
from ringattn.execution.carriers import ProcessRank, Timed
from ringattn.kernels import select
from ringattn.models.decoder import Decoder
from ringattn.planning.layer_plans import NONE
from ringattn.training.batch import MicroBatch, load_batch, numbers
from ringattn.training.checkpoints import saver as checkpoints
from ringattn.training.checkpoints import states
from ringattn.training.checkpoints.saver import Manifest, Saver
from ringattn.training.config import as_yaml, without_effect
from ringattn.training.engines import Engine, Parts
from ringattn.training.evaluating import evaluate
from ringattn.training.evaluating.evaluate import Evaluation
from ringattn.training.evaluating.sample import generate
from ringattn.training.forecast import Forecast
from ringattn.training.job import Job
from ringattn.training.launching import directory
from ringattn.training.observing.display import Display, plan_table
from ringattn.training.observing.facts import write_facts
from ringattn.training.observing.heartbeat import Heartbeat
from ringattn.training.observing.metrics import (
    DTYPES,
    MetricsLog,
    measured_peak,
    peak_memory_bytes,
)
from ringattn.training.observing.pictures import draw
from ringattn.training.observing.profile import Profile
from ringattn.training.optimizer import Schedule
from ringattn.training.run import TrainingRun

PATIENCE_S = 10.0  # at the end, for what is read in the background
PARTS = ("exchange", "engine", "data")  # of a step, timed; the rest is "compute"


class Diverged(RuntimeError):
    """Loss or gradient were not finite too many times in a row."""


class DamagedData(RuntimeError):
    """Tokens are not what was written; raised on all ranks."""


class Refused(RuntimeError):
    """The model cannot be trained as it is asked for; raised on all ranks before the first step."""


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that receives every SIGTERM and SIGINT; the old handlers return afterwards."""
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(job: Job, context: Context, stops: list[int]) -> None:
    """Runs the job on this rank. Returns normally after the last step, or once any rank's
    ``stops`` (see :func:`stop_requests`) is not empty: after the step at hand and a checkpoint.
    """
    run, rank = job.run, dist.get_rank()
    resume, damaged = checkpoints.first_sound(job.resume)
    if job.resume and not resume:
        raise checkpoints.Damaged(f"{damaged[0]}; no other checkpoint is left")
    start = resume[1] if resume else job.manifest
    display = Display(rank == 0, run.train.steps, start.step)
    if resume and start.step >= run.train.steps:
        display.say(
            f"nothing left to do: {resume[0]} is at step {start.step}, train.steps="
            f"{run.train.steps}; give more, or checkpoint.resume=never for a run from the start"
        )
        return
    for remark in job.remarks + damaged:
        display.say(f"passed over: {remark}")
    if rank == 0:
        (job.run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        if aside := checkpoints.set_aside(job.run_dir, resume):
            display.say(f"what another run left in {job.run_dir} is now in {aside.name}")
        (job.run_dir / "config.yaml").write_text(as_yaml(run))
        (job.run_dir / directory.LAUNCH).write_text(directory.launch())
    dist.barrier()
    tokens_per_step = _per_step(run, context) * run.seq_len
    schedule = asdict(Schedule.of(run.optim, run.train.steps * tokens_per_step))
    for remark in [*without_effect(run, start.step), *_other_rate(start, schedule)]:
        display.say(remark)
    start = replace(start, schedule=schedule)
    engine = build_engine(job, context)
    if resume:
        with states.Saved([resume[0] / name for name in sorted(start.files)]) as saved:
            states.fill(engine, saved, job.source, start.adam_steps)
        display.say(f"resumed {resume[0]} at step {start.step}")
    else:
        states.fill(engine, job.source, job.source, 0)
    if run.model.unchanged:
        fill_buffers(engine, job.source)
    stream = job.data.train
    log = MetricsLog(job.run_dir, run.logger, asdict(run), start.step) if rank == 0 else None
    try:
        split = run.parallel.strategy(job.model, job.hardware, run.attention.sets)
        sequences = _numbers(job, context, stream, start.sequences_seen)[0][0]
        first = load_batch(run.attention, job.model.layers, stream, context, split, sequences)
        split = split.like(first.plans)
        if run.model.unchanged:
            try:
                split_model(engine).self_check(
                    engine.root, first.plans, context.cp_group, context.kernel
                )
            except ValueError as error:
                raise Refused(str(error)) from error
        _self_check(job, context, engine, stream, split, start)
        dtype = DTYPES[run.precision]
        peak, measure = _peak(job, context)
        kernel = select(run.kernel, dtype, context.device, job.model.head_dim)
        if log:  # rank 0: the others need no more of the plan than their own steps
            name = kernel.__name__.split(".")[-1]
            ahead = Forecast(run, context.world, first.plans, job.hardware, context.device.type)
            display.say(plan_table(ahead, name, peak, measure))
            log.describe(write_facts(ahead, name, job.run_dir))
        display.say("self-check passed: tokens reach across ranks, batches follow the mesh")
        for remark in job.data.remarks:
            display.say(remark)
        display.say(f"run directory: {job.run_dir}")
        at = checkpoints.folder(job.run_dir, start.step)
        saved = resume is not None and resume[0].resolve() == at.resolve()
        with Heartbeat(run.parallel.timeout_s) as heartbeat, _integrity(job) as integrity:
            evaluation = Evaluation.make(run, context, engine, split, job.data)
            end = _Steps(
                job, context, engine, stream, split, evaluation, peak, stops, display, log,
                heartbeat, integrity,
            ).run(start, saved)  # fmt: skip
        if end.step < run.train.steps:
            what = "no checkpoint" if run.checkpoint.every is None else "checkpoint saved"
            display.say(f"stopped on request at step {end.step}; {what}")
        elif run.train.sample_tokens and not run.attention.for_any_length:
            display.say("no sample: attention.mask is of one length")
        elif run.train.sample_tokens:
            text = generate(
                engine,
                context,
                job.data.tokenizer,
                run.train.sample_prompt,
                run.train.sample_tokens,
                run.seed,
                replace(split, layout="contiguous"),
                run.attention,
                job.model.layers,
            )
            display.console.rule("sample", align="left")
            display.console.print(text, markup=False)
            display.console.rule()
        display.say(f"run directory: {job.run_dir}")
    finally:
        if log:
            log.close()
        engine.close()


def build_engine(job: Job, context: Context) -> Engine:
    """The configured engine, on every rank; its weights are still to be written."""
    run = job.run
    layers = run.attention.layers(job.model.layers)

    def make_model() -> nn.Module:
        if not run.model.unchanged:
            return Decoder(job.model, None, run.memory, layers)
        from ringattn.hf.describe import config_of  # here: transformers is an extra
        from ringattn.hf.trained import SplitModel

        lora = run.model.lora if run.model.lora.rank else None
        return SplitModel(config_of(Path(run.model.path).expanduser()), run.memory, layers, lora)

    parts = Parts(
        make_model=make_model,
        trained=job.model.trained,
        optimizer=run.optim,
        context=context,
        precision=run.precision,
        batch_size=run.batch_size,
        grad_accum=run.train.grad_accum,
    )
    return run.engine.build(parts)


def split_model(engine: Engine) -> Any:
    """The unchanged transformers model inside of an engine."""
    from ringattn.hf.trained import SplitModel

    return next(module for module in engine.root.modules() if isinstance(module, SplitModel))


def fill_buffers(engine: Engine, source: Any) -> None:
    """What a transformers model keeps beside parameters, from its folder."""
    inner = split_model(engine).inner
    with torch.no_grad():
        for name, value in source.buffers():
            inner.get_buffer(name).copy_(value)


def _peak(job: Job, context: Context) -> tuple[float, str]:
    """FLOP/s of a rank that MFU divides by, and where they come from."""
    run = job.run
    if run.peak_flops:
        return run.peak_flops, "peak_flops"
    if job.hardware:
        return job.hardware.flops(run.precision), f"peak of {job.hardware.name}"
    return measured_peak(context.device, DTYPES[run.precision]), "measured matrix product"


def _numbers(
    job: Job, context: Context, stream: Sequences, seen: int
) -> tuple[list[list[int]], float]:
    run = job.run
    return numbers(
        run.attention, job.model, stream, context, run.batch_size, run.train.grad_accum, seen,
        run.data.balance,
    )  # fmt: skip


def _self_check(
    job: Job,
    context: Context,
    engine: Engine,
    stream: Sequences,
    split: Strategy,
    start: Manifest,
) -> None:
    """Configured must mean engaged: attention crosses ranks, and data follows the mesh."""
    engine.train(False)
    states = sorted([*job.run.attention.mixers, *job.run.attention.sets])
    kinds = sorted({*job.run.attention.layers(job.model.layers)} - {NONE, *states})
    if job.run.model.unchanged:  # whose states its own check has proved
        states = []
    if kinds or states:
        check_engaged(context, split, engine.forward, job.model.vocab_size, kinds, states)
    engine.train(True)
    sequences = _numbers(job, context, stream, start.sequences_seen)[0][0]
    check_same_data(context, sequences, stream.digest(sequences))


def _per_step(run: TrainingRun, context: Context) -> int:
    """Sequences of an optimizer step, over all ranks."""
    return run.batch_size * context.dp * run.train.grad_accum


def _other_rate(saved: Manifest, now: dict[str, Any]) -> list[str]:
    """What to say of a learning rate that does not go on as the run before had it."""
    if not saved.schedule or saved.schedule == now:
        return []
    before, after = Schedule(**saved.schedule), Schedule(**now)
    rates = [f"{each.rate(saved.tokens_seen):.3g} ({each})" for each in (before, after)]
    return [f"the learning rate changes at step {saved.step} from {rates[0]} to {rates[1]}"]


def _integrity(job: Job) -> Integrity:
    """Each process of a machine sees to a share of the files of tokens."""
    rank, local, world = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", "0"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))
    )
    own = job.data.files[local::world]
    machines = -(-dist.get_world_size() // world)
    return Integrity(own, job.data.marks, len(own) * (rank // world) // machines)


@dataclass
class _Steps:
    """The optimizer steps of one run on this rank."""

    job: Job
    context: Context
    engine: Engine
    stream: Sequences
    split: Strategy
    evaluation: Evaluation
    peak: float
    stops: list[int]
    display: Display
    log: MetricsLog | None
    heartbeat: Heartbeat
    integrity: Integrity
    skipped: int = 0  # in a row

    def __post_init__(self) -> None:
        self.watch = self.engine.watch
        self.carrier = Timed(ProcessRank(self.context.cp_group), self.watch)

    def run(self, state: Manifest, saved: bool) -> Manifest:
        """From ``state`` to the last step, or to a request to stop; ``saved``: whether the run
        directory already holds ``state``, which then is not written again."""
        run, display = self.job.run, self.display
        saver = Saver(self.job.run_dir, run.checkpoint.keep, run.checkpoint.background)
        every, at = run.checkpoint.every, state.step if saved else -1
        first, last, began = None, None, time.perf_counter()
        profile = Profile(run.profile.steps, self.job.run_dir, self.context.device)
        with display.progress, profile:
            while state.step < run.train.steps:
                profile.before(state.step + 1)
                self.watch.read()  # forgets what lies between steps
                begin = time.perf_counter()
                self.heartbeat.where = f"step {state.step + 1}, data"
                with self.watch.section("data"):
                    batches, unequal = self._batches(state)
                area = sum(batch.plans.area for batch in batches) / self.context.cp
                supervised, area, stop, written, damaged = self.context.total(
                    sum(batch.supervised for batch in batches), area, len(self.stops), saver.ready,
                    bool(self.integrity.problem),
                )  # fmt: skip
                if written == self.context.world:
                    saver.finish()
                if damaged:
                    self._damaged(state.step)
                if stop:
                    break
                try:
                    state, values = self._step(state, batches, supervised)
                except Diverged:
                    saver.finish()  # the last sound state may still be on its way
                    raise
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
                last = values["loss"]
                first = first or last
                display.update(values)
                if self.log:
                    self.log.write(values)
                self._evaluate(state.step)
                if every and state.step % every == 0:
                    self.heartbeat.where = f"step {state.step}, checkpoint"
                    saver.save(self.engine, state)
                    at = state.step
        self.heartbeat.where = f"step {state.step}, data read to its end"
        (left,) = self.context.total(self.integrity.finish(0 if self.stops else PATIENCE_S))
        self._damaged(state.step)
        if left:
            display.say(f"{left:.0f} files of tokens have not been seen to be whole; the next run "
                        "goes on with them")  # fmt: skip
        self.heartbeat.where = f"step {state.step}, last checkpoint"
        if at != state.step and every is not None:
            saver.save(self.engine, state)
        saver.finish()
        if first is not None:
            display.say(
                f"loss {first:.3f} -> {last:.3f}{self._bits(last)} in "
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

    def _evaluate(self, step: int) -> None:
        every, last = self.job.run.eval.every, self.job.run.train.steps
        if not every or (step % every and step != last):
            return
        self.heartbeat.where = f"step {step}, evaluation"
        values = self.evaluation.run(step)
        self.display.say(evaluate.summary(values))
        if self.log:
            evaluate.write(self.job.run_dir, values)
            self.log.write_evaluation(values, draw(self.job.run_dir, values))

    @property
    def _per_step(self) -> int:
        return _per_step(self.job.run, self.context)

    def _batches(self, state: Manifest) -> tuple[list[MicroBatch], float]:
        """(The micro-steps of a step, how unequal the work of data ranks is.)"""
        each, unequal = _numbers(self.job, self.context, self.stream, state.sequences_seen)
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

    def _report_skipped(self, step: int, loss: float, norm: float, ids: list[int]) -> None:
        """Writes down which sequences it was. Raises Diverged after too many in a row."""
        most = self.job.run.train.max_skipped
        path = self.job.run_dir / "skipped.jsonl"
        if self.log:
            # Python's JSON would write NaN, which others do not read.
            line = {"step": step, "loss": str(loss), "grad_norm": str(norm), "sequences": ids}
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
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
