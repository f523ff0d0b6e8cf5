"""The training loop: data in, optimizer steps, metrics, checkpoints, a sample at the end."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf

from ringattn import masks
from ringattn.context import (
    IGNORED,
    Context,
    Strategy,
    check_engaged,
    check_same_data,
    loss_sum,
    position_ids,
)
from ringattn.data.corpus import Corpus
from ringattn.data.stream import Span, Stream
from ringattn.masks import Mask
from ringattn.models.decoder import Decoder, ModelConfig
from ringattn.plan import Plan
from ringattn.training import checkpoint
from ringattn.training.checkpoint import Manifest
from ringattn.training.display import Display, plan_table
from ringattn.training.engine import DeepSpeedEngine
from ringattn.training.metrics import (
    DTYPES,
    MetricsLog,
    check_login,
    measured_peak,
    peak_memory_bytes,
    step_flops,
)
from ringattn.training.sample import generate


class Diverged(RuntimeError):
    """The loss or the gradient is not finite."""


@dataclass(frozen=True)
class Job:
    """A checked run: everything that is known before a model is built."""

    config: DictConfig
    model: ModelConfig
    corpus: Corpus
    run_dir: Path
    resume: tuple[Path, Manifest] | None
    manifest: Manifest  # of step 0


@dataclass(frozen=True)
class MicroBatch:
    """One micro-step's tokens on this rank, ``[1, tokens]``, and the plan that they share."""

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    plan: Plan

    @property
    def supervised(self) -> int:
        return int((self.labels != IGNORED).sum())


def segments(config: DictConfig, spans: list[Span]) -> list[int]:
    """The lengths of what attends itself only: documents, or whole sequences."""
    if config.attention.name == "documents":
        return [span.length for span in spans]
    return [config.seq_len] * config.batch_size


def build_mask(config: DictConfig, lengths: list[int]) -> Mask:
    """The mask of segments laid end to end: causal, within the window or at the first keys."""
    window, sinks = config.attention.window, config.attention.sinks
    n = sum(lengths)
    if window is None:
        return masks.documents(lengths)
    slices = []
    for at, length in zip(accumulate(lengths, initial=0), lengths, strict=False):
        own, first = masks.Run(at, at + length), masks.Run(at, at + min(length, sinks))
        near = masks.Slice.make(own, own, 1 - window, 0)
        far = masks.Slice.make(own, first, None, -window)  # the first keys, beyond the window
        slices += [near, far]
    return masks.from_slices(slices, n, n)


def strategy(config: DictConfig, model: ModelConfig) -> Strategy:
    """How this run splits its masks."""
    parallel = config.parallel
    return Strategy(
        cp=parallel.cp,
        layout=parallel.layout,
        schedule=parallel.schedule,
        ulysses=parallel.ulysses,
        node_size=parallel.node_size,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
    )


def load_batch(
    job: Job, stream: Stream, context: Context, split: Strategy, sequences: list[int]
) -> MicroBatch:
    """This rank's part of ``sequences``; only its own tokens are read."""
    config = job.config
    spans = stream.batch_spans(sequences)
    lengths = segments(config, spans)
    plan = split.plan(build_mask(config, lengths))
    local = stream.local(spans, plan.layout, context.cp_rank)
    tokens, labels, positions = (
        x.to(context.device)
        for x in (
            torch.from_numpy(local.tokens),
            torch.from_numpy(local.labels),
            position_ids(plan.layout, context.cp_rank, lengths),
        )
    )
    return MicroBatch(tokens[None], labels[None], positions, plan)


def learning_rate(config: DictConfig, tokens_seen: int, total_tokens: int) -> float:
    """Linear warm-up, then a cosine to min_lr_ratio * lr, both in tokens, whatever the split."""
    optim = config.optim
    if tokens_seen < optim.warmup_tokens:
        return optim.lr * (tokens_seen + 1) / optim.warmup_tokens
    done = (tokens_seen - optim.warmup_tokens) / max(1, total_tokens - optim.warmup_tokens)
    falling = (1 + math.cos(math.pi * min(1, done))) / 2
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * falling)


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
    start = job.resume[1] if job.resume else job.manifest
    display = Display(rank == 0, config.train.steps, start.step)
    if rank == 0:
        job.run_dir.mkdir(parents=True, exist_ok=True)
        if aside := checkpoint.set_aside(job.run_dir, job.resume):
            display.say(f"what another run left in {job.run_dir} is now in {aside.name}")
        OmegaConf.save(config, job.run_dir / "config.yaml")
    engine = DeepSpeedEngine(Decoder(job.model, config.seed), config, context)
    if job.resume:
        engine.load(job.resume[0])
        display.say(f"resumed {job.resume[0]} at step {start.step}")
    stream = Stream(job.corpus, config.seq_len, config.seed)
    log = MetricsLog(job.run_dir, config, start.step) if rank == 0 else None
    try:
        split = strategy(config, job.model)
        sequences = _sequences(config, context, start.sequences_seen, 0)
        first = load_batch(job, stream, context, split, sequences)
        split = split.like(first.plan)
        _self_check(job, context, engine, stream, split, start)
        peak = config.peak_flops or measured_peak(context.device, DTYPES[config.precision])
        display.say(plan_table(config, job.model, context, first.plan, peak))
        display.say("self-check passed: tokens reach across ranks, batches follow the mesh")
        display.say(f"run directory: {job.run_dir}")
        end = _steps(job, context, engine, stream, split, start, peak, stops, display, log)
        if end.step < config.train.steps:
            display.say(f"stopped on request at step {end.step}; checkpoint saved")
        elif config.train.sample_tokens:
            text = generate(
                engine,
                context,
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


def _self_check(
    job: Job,
    context: Context,
    engine: DeepSpeedEngine,
    stream: Stream,
    split: Strategy,
    start: Manifest,
) -> None:
    """Configured must mean engaged: attention crosses ranks, and data follows the mesh."""
    config = job.config
    engine.train(False)
    check_engaged(context, split, engine.forward, job.model.vocab_size)
    engine.train(True)
    sequences = _sequences(config, context, start.sequences_seen, 0)
    check_same_data(context, sequences, stream.digest(sequences))


def _sequences(config: DictConfig, context: Context, seen: int, micro: int) -> list[int]:
    """The sequence numbers of one micro-step: they depend on the data coordinate only."""
    first = seen + (micro * context.dp + context.dp_rank) * config.batch_size
    return list(range(first, first + config.batch_size))


def _steps(
    job: Job,
    context: Context,
    engine: DeepSpeedEngine,
    stream: Stream,
    split: Strategy,
    state: Manifest,
    peak: float,
    stops: list[int],
    display: Display,
    log: MetricsLog | None,
) -> Manifest:
    config = job.config
    accum, every = config.train.grad_accum, config.checkpoint.every
    per_step = config.batch_size * context.dp * accum
    total_tokens = config.train.steps * per_step * config.seq_len
    first_loss, began = None, time.perf_counter()
    # A run that has nothing left to do must not write its last checkpoint again.
    at = checkpoint.folder(job.run_dir, state.step)
    saved = state.step if job.resume and job.resume[0].resolve() == at.resolve() else -1
    with display.progress:
        while state.step < config.train.steps:
            begin = time.perf_counter()
            batches = [
                load_batch(job, stream, context, split, sequences)
                for sequences in (
                    _sequences(config, context, state.sequences_seen, m) for m in range(accum)
                )
            ]
            area = sum(batch.plan.mask.area for batch in batches) / context.cp
            supervised, area, stop = context.total(
                sum(batch.supervised for batch in batches), area, len(stops)
            )
            if stop:
                break
            lr = learning_rate(config, state.tokens_seen, total_tokens)
            engine.set_lr(lr)
            local_loss, norm = torch.zeros((), device=context.device), None
            for batch in batches:
                logits = engine.forward(batch.tokens, batch.positions, context.attend(batch.plan))
                loss = loss_sum(logits, batch.labels)
                engine.backward(context.scaled_loss(loss, supervised, accum))
                local_loss += loss.detach()
                norm = engine.step()
            loss = context.total(float(local_loss))[0] / max(supervised, 1)
            # Both numbers are global, so all ranks stop here together.
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise Diverged(
                    f"step {state.step + 1}: loss {loss}, gradient norm {norm}; nothing of this "
                    f"step is saved (run directory: {job.run_dir})"
                )
            tokens = per_step * config.seq_len
            state = replace(
                state,
                step=state.step + 1,
                sequences_seen=state.sequences_seen + per_step,
                tokens_seen=state.tokens_seen + tokens,
            )
            seconds = time.perf_counter() - begin
            flops = step_flops(job.model, tokens, int(area))
            values = {
                "step": state.step,
                "loss": loss,
                "grad_norm": norm,
                "lr": lr,
                "tokens_seen": state.tokens_seen,
                "supervised_tokens": int(supervised),
                "tokens_per_s": tokens / seconds,
                "step_s": seconds,
                "mfu": flops / seconds / (peak * context.world),
                "peak_memory_bytes": peak_memory_bytes(context.device),
            }
            first_loss = first_loss or loss
            display.update(values)
            if log:
                log.write(values)
            if every and state.step % every == 0:
                _save(job, engine, state)
                saved = state.step
    if saved != state.step:
        _save(job, engine, state)
    if first_loss is not None:
        display.say(
            f"loss {first_loss:.3f} -> {loss:.3f} ({loss / math.log(2):.2f} bits per byte) in "
            f"{time.perf_counter() - began:.0f} s, {state.tokens_seen:,} tokens"
        )
    return state


def _save(job: Job, engine: DeepSpeedEngine, state: Manifest) -> None:
    path = checkpoint.folder(job.run_dir, state.step)
    engine.save(path)
    dist.barrier()  # the manifest says that every rank's part is there
    if dist.get_rank() == 0:
        checkpoint.publish(path, state)
    dist.barrier()


def prepare(config: DictConfig, run_dir: Path, world: int) -> Job:
    """Everything that can be wrong before a model exists is found here. Raises ValueError."""
    check_login(config)
    model = ModelConfig(**OmegaConf.to_container(config.model))
    corpus = Corpus.open(config.data.root, config.data.glob)
    manifest = Manifest(
        step=0,
        sequences_seen=0,
        tokens_seen=0,
        world=world,
        zero_stage=config.engine.zero_stage,
        precision=config.precision,
        seq_len=config.seq_len,
        seed=config.seed,
        corpus=corpus.fingerprint,
        model=asdict(model),
        attention=OmegaConf.to_container(config.attention),
    )
    resume = checkpoint.find(str(config.checkpoint.resume), run_dir)
    if resume:
        checkpoint.check(*resume, manifest)
        resume = (resume[0], replace(resume[1], world=world))
    return Job(config, model, corpus, run_dir, resume, manifest)
