"""The training loop: data in, optimizer steps, metrics, checkpoints, a sample at the end."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
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
    position_ids,
)
from ringattn.data.corpus import Corpus
from ringattn.data.stream import Span, Stream
from ringattn.masks import Mask
from ringattn.models.decoder import ModelConfig, shapes
from ringattn.models.hf_config import UnknownModel
from ringattn.models.hf_weights import Pretrained
from ringattn.models.rope_config import RopeConfig
from ringattn.plan import Plan
from ringattn.training import checkpoint, states
from ringattn.training import engine as engines
from ringattn.training.checkpoint import Found, Manifest, Saver
from ringattn.training.display import Display, plan_table
from ringattn.training.engine import Engine
from ringattn.training.heartbeat import Heartbeat
from ringattn.training.metrics import (
    DTYPES,
    MetricsLog,
    check_login,
    measured_peak,
    peak_memory_bytes,
    step_flops,
)
from ringattn.training.sample import generate
from ringattn.training.settings import ConfigError, path_errors


class Diverged(RuntimeError):
    """Loss or gradient were not finite too many times in a row."""


@dataclass(frozen=True)
class Job:
    """A checked run: everything that is known before a model is built."""

    config: DictConfig
    model: ModelConfig
    corpus: Corpus
    run_dir: Path
    manifest: Manifest  # of step 0
    source: states.Source  # the weights of step 0
    resume: list[Found] = field(default_factory=list)  # newest first
    remarks: list[str] = field(default_factory=list)  # on checkpoints that are passed over


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
        at = checkpoint.folder(job.run_dir, start.step)
        saved = resume is not None and resume[0].resolve() == at.resolve()
        with Heartbeat(config.parallel.timeout_s) as heartbeat:
            end = _Steps(
                job, context, engine, stream, split, peak, stops, display, log, heartbeat
            ).run(start, saved)
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
    engine: Engine,
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


@dataclass
class _Steps:
    """The optimizer steps of one run on this rank."""

    job: Job
    context: Context
    engine: Engine
    stream: Stream
    split: Strategy
    peak: float
    stops: list[int]
    display: Display
    log: MetricsLog | None
    heartbeat: Heartbeat
    skipped: int = 0  # in a row

    def run(self, state: Manifest, saved: bool) -> Manifest:
        """From ``state`` to the last step, or to a request to stop; ``saved``: whether the run
        directory already holds ``state``, which then is not written again."""
        config, display = self.job.config, self.display
        saver = Saver(self.job.run_dir, config.checkpoint.keep, config.checkpoint.background)
        every, at = config.checkpoint.every, state.step if saved else -1
        first, last, began = None, None, time.perf_counter()
        with display.progress:
            while state.step < config.train.steps:
                begin = time.perf_counter()
                self.heartbeat.where = f"step {state.step + 1}, data"
                batches = self._batches(state)
                area = sum(batch.plan.mask.area for batch in batches) / self.context.cp
                supervised, area, stop, written = self.context.total(
                    sum(batch.supervised for batch in batches), area, len(self.stops), saver.ready
                )
                if written == self.context.world:
                    saver.finish()
                if stop:
                    break
                state, values = self._step(state, batches, supervised)
                seconds = time.perf_counter() - begin
                tokens = self._per_step * config.seq_len
                flops = step_flops(self.job.model, tokens, int(area))
                values |= {
                    "tokens_per_s": tokens / seconds,
                    "step_s": seconds,
                    "mfu": flops / seconds / (self.peak * self.context.world),
                    "peak_memory_bytes": peak_memory_bytes(self.context.device),
                }
                last = values["loss"]
                first = first or last
                display.update(values)
                if self.log:
                    self.log.write(values)
                if every and state.step % every == 0:
                    self.heartbeat.where = f"step {state.step}, checkpoint"
                    saver.save(self.engine, state)
                    at = state.step
        self.heartbeat.where = f"step {state.step}, last checkpoint"
        if at != state.step:
            saver.save(self.engine, state)
        saver.finish()
        if first is not None:
            display.say(
                f"loss {first:.3f} -> {last:.3f} ({last / math.log(2):.2f} bits per byte) in "
                f"{time.perf_counter() - began:.0f} s, {state.tokens_seen:,} tokens"
            )
        return state

    @property
    def _per_step(self) -> int:
        """Sequences of an optimizer step, over all ranks."""
        config = self.job.config
        return config.batch_size * self.context.dp * config.train.grad_accum

    def _batches(self, state: Manifest) -> list[MicroBatch]:
        config, seen = self.job.config, state.sequences_seen
        return [
            load_batch(
                self.job, self.stream, self.context, self.split,
                _sequences(config, self.context, seen, micro),
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
            loss, _ = engine.forward(
                batch.tokens, batch.positions, context.attend(batch.plan), batch.labels
            )
            self.heartbeat.where = f"step {number}, backward"
            engine.backward(context.scaled_loss(loss, supervised, accum))
            local_loss += loss.detach()
            self.heartbeat.where = f"step {number}, optimizer"
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


def prepare(config: DictConfig, run_dir: Path, world: int) -> Job:
    """Everything that can be wrong before a model exists is found here. Raises ValueError."""
    check_login(config)
    sizes = OmegaConf.to_container(config.model)
    path = sizes.pop("path")
    model = ModelConfig(**{**sizes, "rope": RopeConfig(**sizes["rope"])})
    corpus = Corpus.open(config.data.root, config.data.glob)
    manifest = Manifest(
        step=0,
        sequences_seen=0,
        tokens_seen=0,
        adam_steps=0,
        precision=config.precision,
        seq_len=config.seq_len,
        seed=config.seed,
        corpus=corpus.fingerprint,
        model=asdict(model),
        attention=OmegaConf.to_container(config.attention),
        written_by=f"{config.engine.name}, ZeRO {config.engine.zero_stage}, {world} ranks, "
        f"parallel.cp={config.parallel.cp}",
    )
    resume, remarks = checkpoint.find(str(config.checkpoint.resume), run_dir)
    for found in resume:
        checkpoint.check(*found, manifest)
    source: states.Source = states.Fresh(model, config.seed)
    if path is not None and not resume:
        with path_errors("model.path", path):
            try:
                source = Pretrained(Path(path).expanduser(), shapes(model))
            except UnknownModel as error:
                raise ConfigError(f"model.path: {error}") from None
    return Job(config, model, corpus, run_dir, manifest, source, resume, remarks)
