"""A run as it is known before a model is built; what can be wrong with it is found here."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ringattn.cost import Hardware
from ringattn.data.open_data import Opened, Progress, open_data
from ringattn.models.decoder import ModelConfig, shapes
from ringattn.models.hf_config import UnknownModel
from ringattn.models.hf_weights import Pretrained
from ringattn.training import fits
from ringattn.training.checkpoints import saver, states
from ringattn.training.checkpoints.saver import Found, Manifest
from ringattn.training.config import hardware_of, path_errors
from ringattn.training.evaluating.evaluate import make_probes
from ringattn.training.run import TrainingRun
from ringattn.typed import SettingsError


@dataclass(frozen=True)
class Job:
    """A checked run."""

    run: TrainingRun
    model: ModelConfig
    data: Opened
    run_dir: Path
    manifest: Manifest  # of step 0
    source: states.Source  # the weights of step 0
    resume: list[Found] = field(default_factory=list)  # newest first
    remarks: list[str] = field(default_factory=list)  # on checkpoints that are passed over
    hardware: Hardware | None = None  # what predictions, and a schedule of "auto", count on


def prepare(
    run: TrainingRun, run_dir: Path, world: int, progress: Progress = lambda done, total: None
) -> Job:
    """Everything that can be wrong before a model exists is found here. Raises ValueError."""
    run.engine.check()
    run.logger.check()
    model, path = run.sizes, run.model.path
    held_out = (run.eval.holdout, run.eval.root)
    fits.check_keys(run)
    data = open_data(run.data, run.seq_len, run.seed, progress, *held_out)
    if data.tokenizer.vocab_size > model.vocab_size:
        raise SettingsError(
            f"model.vocab_size={model.vocab_size}: the tokenizer has {data.tokenizer.vocab_size} "
            "tokens; give at least so many"
        )
    fits.check_tokenizer(run, data.tokenizer)
    manifest = Manifest(
        step=0,
        sequences_seen=0,
        tokens_seen=0,
        adam_steps=0,
        precision=run.precision,
        seq_len=run.seq_len,
        seed=run.seed,
        corpus=data.fingerprint,
        model=asdict(run.model.sizes) | _unchanged(run),
        attention=asdict(run.attention),
        written_by=f"{run.engine.name}, ZeRO {run.engine.zero_stage}, {world} ranks, "
        f"parallel.cp={run.parallel.cp}",
    )
    if run.eval.every:
        make_probes(run.eval, run.seq_len, run.seed, data)
        if not run.eval.probes and (data.held_out is None or not run.eval.sequences):
            raise SettingsError(
                f"eval.every={run.eval.every}: nothing to evaluate; give eval.holdout or "
                "eval.root (and eval.sequences above 0), or eval.probes"
            )
    resume, remarks = saver.find(run.checkpoint.resume, run_dir)
    for checkpoint in resume:
        saver.check(*checkpoint, manifest)
    source: states.Source = states.Fresh(model, run.seed)
    if path is not None:
        with path_errors("model.path", path):
            try:
                source = _weights(run, Path(path).expanduser())
            except UnknownModel as error:
                raise SettingsError(f"model.path: {error}") from None
    hardware = hardware_of(run, world)
    return Job(run, model, data, run_dir, manifest, source, resume, remarks, hardware)


def _unchanged(run: TrainingRun) -> dict[str, Any]:
    """Of a module that transformers makes: what it is made of, which sizes alone do not say."""
    if not run.model.unchanged:
        return {}
    folder = Path(run.model.path).expanduser()
    text = (folder / "config.json").read_bytes()
    made = {"unchanged": f"of config.json {hashlib.sha256(text).hexdigest()[:16]}"}
    if not run.model.lora.rank:
        return made
    from ringattn.hf.lora import fingerprint

    # Frozen weights are not in checkpoints: they have to be there again.
    return made | {"lora": asdict(run.model.lora), "frozen": fingerprint(folder)}


def _weights(run: TrainingRun, folder: Path) -> states.Source:
    if not run.model.unchanged:
        return Pretrained(folder, shapes(run.model.sizes))
    from ringattn.hf.describe import PREFIX, config_of, empty_model  # here: it takes seconds
    from ringattn.hf.weights import HubWeights

    source = HubWeights(folder, empty_model(config_of(folder)), PREFIX)
    if not run.model.lora.rank:
        return source
    from ringattn.hf.lora import WithAdapters

    return WithAdapters(source, run.seed)
