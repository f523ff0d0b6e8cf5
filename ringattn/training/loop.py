"""A training run: resumed or new, built, proven, stepped, sampled from at the end."""

from __future__ import annotations

import os
from collections.abc import Sized
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ringattn.context import Context, Strategy, check_engaged, check_same_data
from ringattn.data.integrity import Integrity
from ringattn.data.stream import Sequences
from ringattn.kernels import select
from ringattn.models.decoder import Decoder
from ringattn.planning.layer_plans import NONE
from ringattn.training.batch import load_batch
from ringattn.training.checkpoints import saver as checkpoints
from ringattn.training.checkpoints import states
from ringattn.training.checkpoints.saver import Manifest
from ringattn.training.config import as_yaml, without_effect
from ringattn.training.engines import Engine, Parts
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
    EVALUATIONS,
    MetricsLog,
    measured_peak,
    recorded,
)
from ringattn.training.optimizer import Schedule
from ringattn.training.run import TrainingRun
from ringattn.training.steps import Steps, micro_batches, sequences_per_step
from ringattn.typed import SettingsError


class Refused(RuntimeError):
    """The model cannot be trained as it is asked for; raised on all ranks before the first step."""


def train(job: Job, context: Context, stops: Sized, heartbeat: Heartbeat) -> bool:
    """Runs the job on this rank. Returns after the last step, or once any rank's ``stops`` (see
    :mod:`ringattn.training.stopping`) is not empty: after the step at hand, or the layer of a long
    one, and a checkpoint. Whether all steps are done.
    """
    run, rank = job.run, dist.get_rank()
    resume, damaged = checkpoints.first_sound(job.resume)
    if job.resume and not resume:
        raise checkpoints.Damaged(f"{damaged[0]}; no other checkpoint is left")
    start = resume[1] if resume else job.manifest
    display = Display(rank == 0, run.train.steps, start.step)
    at = checkpoints.folder(job.run_dir, start.step)
    saved = resume is not None and resume[0].resolve() == at.resolve()
    evaluate_first = run.eval.first and not saved
    evaluate_first |= saved and _lacks_evaluation(run, job.run_dir, start.step)
    if resume and start.step >= run.train.steps and not evaluate_first:
        display.say(
            f"nothing left to do: {resume[0]} is at step {start.step}, train.steps="
            f"{run.train.steps}; give more, or checkpoint.resume=never for a run from the start"
        )
        return True
    for remark in job.remarks + damaged:
        display.say(f"passed over: {remark}")
    if rank == 0:
        (job.run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        if aside := checkpoints.set_aside(job.run_dir, resume):
            display.say(f"what another run left in {job.run_dir} is now in {aside.name}")
        (job.run_dir / "config.yaml").write_text(as_yaml(run))
        (job.run_dir / directory.LAUNCH).write_text(directory.launch())
    dist.barrier()
    tokens_per_step = sequences_per_step(run, context) * run.seq_len
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
    log, problem = None, ""
    if rank == 0:
        try:
            log = MetricsLog(job.run_dir, run.logger, asdict(run), start.step)
        except (OSError, SettingsError) as error:
            problem = str(error)
    shared = [problem]
    dist.broadcast_object_list(shared)
    if shared[0]:
        engine.close()
        raise Refused(shared[0])
    try:
        split = run.parallel.strategy(job.model, job.hardware, run.attention.sets)
        sequences = micro_batches(job, context, stream, start.sequences_seen)[0][0]
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
        with _integrity(job) as integrity:
            evaluation = Evaluation.make(run, context, engine, split, job.data)
            end = Steps(
                job, context, engine, stream, split, evaluation, peak, stops, display, log,
                heartbeat, integrity, evaluate_first,
            ).run(start, saved)  # fmt: skip
        heartbeat.where = f"the end, after step {end.step}"
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
        return end.step >= run.train.steps
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
    sequences = micro_batches(job, context, stream, start.sequences_seen)[0][0]
    check_same_data(context, sequences, stream.digest(sequences))


def _other_rate(saved: Manifest, now: dict[str, Any]) -> list[str]:
    """What to say of a learning rate that does not go on as the run before had it."""
    if not saved.schedule or saved.schedule == now:
        return []
    before, after = Schedule(**saved.schedule), Schedule(**now)
    rates = [f"{each.rate(saved.tokens_seen):.3g} ({each})" for each in (before, after)]
    return [f"the learning rate changes at step {saved.step} from {rates[0]} to {rates[1]}"]


def _lacks_evaluation(run: TrainingRun, run_dir: Path, step: int) -> bool:
    """Collective. Whether the run was to be evaluated at this step, and was not: the checkpoint
    comes first."""
    due = run.eval.every and (step % run.eval.every == 0 or step == run.train.steps)
    due = due and (step > 0 or run.eval.first)
    shared = [False]
    if due and dist.get_rank() == 0:
        shared = [step not in recorded(run_dir / EVALUATIONS)]
    if due:
        dist.broadcast_object_list(shared)
    return shared[0]


def _integrity(job: Job) -> Integrity:
    """Each process of a machine sees to a share of the files of tokens."""
    rank, local, world = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", "0"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))
    )
    own = job.data.files[local::world]
    machines = -(-dist.get_world_size() // world)
    return Integrity(own, job.data.marks, len(own) * (rank // world) // machines)
