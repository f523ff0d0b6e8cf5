"""The training loop: data in, optimizer steps, metrics, checkpoints, a sample at the end."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf

from ringattn.comm import ProcessRank, Timed
from ringattn.context import Context, Strategy, check_engaged, check_same_data
from ringattn.cost.model import step_flops
from ringattn.data.stream import Sequences
from ringattn.data.tokenizer import BYTES
from ringattn.kernels import select
from ringattn.training import checkpoint, evaluate, states
from ringattn.training import engine as engines
from ringattn.training.batch import MicroBatch, load_batch, numbers, strategy
from ringattn.training.checkpoint import Manifest, Saver
from ringattn.training.display import Display, plan_table
from ringattn.training.engine import Engine
from ringattn.training.evaluate import Evaluation
from ringattn.training.forecast import write_facts
from ringattn.training.heartbeat import Heartbeat
from ringattn.training.job import Job
from ringattn.training.metrics import (
    DTYPES,
    MetricsLog,
    measured_peak,
    peak_memory_bytes,
)
from ringattn.training.pictures import draw
from ringattn.training.profile import Profile
from ringattn.training.sample import generate


def learning_rate(config: DictConfig, tokens_seen: int, total_tokens: int) -> float:
    """Linear warm-up, then a cosine to min_lr_ratio * lr, both in tokens, whatever the split."""
    optim = config.optim
    if tokens_seen < optim.warmup_tokens:
        return optim.lr * (tokens_seen + 1) / optim.warmup_tokens
    done = (tokens_seen - optim.warmup_tokens) / max(1, total_tokens - optim.warmup_tokens)
    falling = (1 + math.cos(math.pi * min(1, done))) / 2
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * falling)


PARTS = ("exchange", "engine", "data")  # of a step, timed; the rest is "compute"


class Diverged(RuntimeError):
    """Loss or gradient were not finite too many times in a row."""


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
    config, rank = job.config, dist.get_rank()
    resume, damaged = checkpoint.first_sound(job.resume)
    if job.resume and not resume:
        raise checkpoint.Damaged(f"{damaged[0]}; no other checkpoint is left")
    start = resume[1] if resume else job.manifest
    display = Display(rank == 0, config.train.steps, start.step)
    for remark in job.remarks + damaged:
        display.say(f"passed over: {remark}")
    if rank == 0:
        (job.run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        if aside := checkpoint.set_aside(job.run_dir, resume):
            display.say(f"what another run left in {job.run_dir} is now in {aside.name}")
        OmegaConf.save(config, job.run_dir / "config.yaml")
    dist.barrier()
    engine = engines.build(config, job.model, context)
    if resume:
        with states.Saved([resume[0] / name for name in sorted(start.files)]) as saved:
            states.fill(engine, saved, start.adam_steps)
        display.say(f"resumed {resume[0]} at step {start.step}")
    else:
        states.fill(engine, job.source, 0)
    stream = job.data.train
    log = MetricsLog(job.run_dir, config, start.step) if rank == 0 else None
    try:
        split = strategy(config, job.model, job.hardware)
        sequences = numbers(config, context, start.sequences_seen, 0)
        first = load_batch(config, stream, context, split, sequences)
        split = split.like(first.plan)
        _self_check(job, context, engine, stream, split, start)
        dtype = DTYPES[config.precision]
        peak, measure = _peak(job, context)
        kernel = select(config.kernel, dtype, context.device, job.model.head_dim)
        where = context.device.type, kernel.__name__.split(".")[-1]
        ends = (where, peak, measure, job.hardware)
        display.say(plan_table(config, job.model, first.plan, context.world, *ends))
        if log:
            log.describe(write_facts(job, first.plan, context.world, where))
        display.say("self-check passed: tokens reach across ranks, batches follow the mesh")
        for remark in job.data.remarks:
            display.say(remark)
        display.say(f"run directory: {job.run_dir}")
        at = checkpoint.folder(job.run_dir, start.step)
        saved = resume is not None and resume[0].resolve() == at.resolve()
        with Heartbeat(config.parallel.timeout_s) as heartbeat:
            evaluation = Evaluation.make(config, context, engine, split, job.data)
            end = _Steps(
                job, context, engine, stream, split, evaluation, peak, stops, display, log,
                heartbeat,
            ).run(start, saved)  # fmt: skip
        if end.step < config.train.steps:
            kept = "no checkpoint" if config.checkpoint.every is None else "checkpoint saved"
            display.say(f"stopped on request at step {end.step}; {kept}")
        elif config.train.sample_tokens:
            text = generate(
                engine,
                context,
                job.data.tokenizer,
                config.train.sample_prompt,
                config.train.sample_tokens,
                config.seed,
                replace(split, layout="contiguous"),
            )
            display.console.rule("sample", align="left")
            display.console.print(text, markup=False)
            display.console.rule()
        display.say(f"run directory: {job.run_dir}")
    finally:
        if log:
            log.close()
        engine.close()


def _peak(job: Job, context: Context) -> tuple[float, str]:
    """FLOP/s of a rank that MFU divides by, and where they come from."""
    config = job.config
    if config.peak_flops:
        return config.peak_flops, "peak_flops"
    if job.hardware:
        return job.hardware.flops(config.precision), f"peak of {job.hardware.name}"
    return measured_peak(context.device, DTYPES[config.precision]), "measured matrix product"


def _self_check(
    job: Job,
    context: Context,
    engine: Engine,
    stream: Sequences,
    split: Strategy,
    start: Manifest,
) -> None:
    """Configured must mean engaged: attention crosses ranks, and data follows the mesh."""
    config = job.config
    engine.train(False)
    check_engaged(context, split, engine.forward, job.model.vocab_size)
    engine.train(True)
    sequences = numbers(config, context, start.sequences_seen, 0)
    check_same_data(context, sequences, stream.digest(sequences))


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
    skipped: int = 0  # in a row

    def __post_init__(self) -> None:
        self.watch = self.engine.watch
        self.carrier = Timed(ProcessRank(self.context.cp_group), self.watch)

    def run(self, state: Manifest, saved: bool) -> Manifest:
        """From ``state`` to the last step, or to a request to stop; ``saved``: whether the run
        directory already holds ``state``, which then is not written again."""
        config, display = self.job.config, self.display
        saver = Saver(self.job.run_dir, config.checkpoint.keep, config.checkpoint.background)
        every, at = config.checkpoint.every, state.step if saved else -1
        first, last, began = None, None, time.perf_counter()
        profile = Profile(config.profile.steps, self.job.run_dir, self.context.device)
        with display.progress, profile:
            while state.step < config.train.steps:
                profile.before(state.step + 1)
                self.watch.read()  # forgets what lies between steps
                begin = time.perf_counter()
                self.heartbeat.where = f"step {state.step + 1}, data"
                with self.watch.section("data"):
                    batches = self._batches(state)
                area = sum(batch.plan.mask.area for batch in batches) / self.context.cp
                supervised, area, stop, written = self.context.total(
                    sum(batch.supervised for batch in batches), area, len(self.stops), saver.ready
                )
                if written == self.context.world:
                    saver.finish()
                if stop:
                    break
                try:
                    state, values = self._step(state, batches, supervised)
                except Diverged:
                    saver.finish()  # the last sound state may still be on its way
                    raise
                seconds = time.perf_counter() - begin
                spent = self.watch.read()
                tokens = self._per_step * config.seq_len
                flops = step_flops(self.job.model, tokens, int(area))
                values |= {
                    "tokens_per_s": tokens / seconds,
                    "step_s": seconds,
                    "pairs": int(area),
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

    def _bits(self, loss: float) -> str:
        if self.job.data.tokenizer.fingerprint != BYTES:
            return ""
        return f" ({loss / math.log(2):.2f} bits per byte)"

    def _evaluate(self, step: int) -> None:
        every, last = self.job.config.eval.every, self.job.config.train.steps
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
        """Sequences of an optimizer step, over all ranks."""
        config = self.job.config
        return config.batch_size * self.context.dp * config.train.grad_accum

    def _batches(self, state: Manifest) -> list[MicroBatch]:
        config, seen = self.job.config, state.sequences_seen
        return [
            load_batch(
                config, self.stream, self.context, self.split,
                numbers(config, self.context, seen, micro),
            )
            for micro in range(config.train.grad_accum)
        ]  # fmt: skip

    def _step(
        self, state: Manifest, batches: list[MicroBatch], supervised: float
    ) -> tuple[Manifest, dict[str, float]]:
        """One optimizer step; skipped, and counted, if its loss or gradient is not finite."""
        config, context, engine = self.job.config, self.context, self.engine
        accum, number = config.train.grad_accum, state.step + 1
        total_tokens = config.train.steps * self._per_step * config.seq_len
        lr = learning_rate(config, state.tokens_seen, total_tokens)
        engine.set_lr(lr)
        local_loss, norm = torch.zeros((), device=context.device), None
        for batch in batches:
            self.heartbeat.where = f"step {number}, forward"
            loss, *_ = engine.forward(
                batch.tokens,
                batch.positions,
                context.attend(batch.plan, self.carrier),
                batch.labels,
            )
            self.heartbeat.where = f"step {number}, backward"
            # A loss that is not finite may have a gradient that is: then nothing must step.
            honest = torch.where(loss.detach().isfinite(), 1.0, math.nan)
            engine.backward(context.scaled_loss(loss, supervised, accum) * honest)
            local_loss += loss.detach()
            self.heartbeat.where = f"step {number}, optimizer"
            with self.watch.section("engine"):
                norm = engine.step()
        loss = context.total(float(local_loss))[0] / max(supervised, 1)
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
            tokens_seen=state.tokens_seen + self._per_step * config.seq_len,
        )
        return state, {
            "step": number,
            "loss": loss,
            "grad_norm": norm,
            "lr": lr,
            "tokens_seen": state.tokens_seen,
            "supervised_tokens": int(supervised),
            "skipped_steps": number - state.adam_steps,
        }

    def _report_skipped(self, step: int, loss: float, norm: float, ids: list[int]) -> None:
        """Writes down which sequences it was. Raises Diverged after too many in a row."""
        most = self.job.config.train.max_skipped
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
