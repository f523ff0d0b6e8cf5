"""A run as it is known before a model is built; what can be wrong with it is found here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ringattn.cost import Hardware
from ringattn.models.decoder import ModelConfig, shapes
from ringattn.models.hf_config import UnknownModel
from ringattn.models.hf_weights import Pretrained
from ringattn.models.rope_config import RopeConfig
from ringattn.training import checkpoint, states
from ringattn.training.checkpoint import Found, Manifest
from ringattn.training.data import Data, Progress, open_data
from ringattn.training.evaluate import make_probes
from ringattn.training.metrics import check_login
from ringattn.training.settings import ConfigError, hardware_of, path_errors


@dataclass(frozen=True)
class Job:
    """A checked run."""

    config: DictConfig
    model: ModelConfig
    data: Data
    run_dir: Path
    manifest: Manifest  # of step 0
    source: states.Source  # the weights of step 0
    resume: list[Found] = field(default_factory=list)  # newest first
    remarks: list[str] = field(default_factory=list)  # on checkpoints that are passed over
    hardware: Hardware | None = None  # what predictions, and a schedule of "auto", count on


def model_of(config: DictConfig) -> ModelConfig:
    """The sizes in ``model.*``. Raises ValueError where they do not fit."""
    sizes = OmegaConf.to_container(config.model)
    del sizes["path"]
    return ModelConfig(**{**sizes, "rope": RopeConfig(**sizes["rope"])})


def prepare(
    config: DictConfig, run_dir: Path, world: int, progress: Progress = lambda done, total: None
) -> Job:
    """Everything that can be wrong before a model exists is found here. Raises ValueError."""
    check_login(config)
    model, path = model_of(config), config.model.path
    data = open_data(config, progress)
    if data.tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size}: the tokenizer has {data.tokenizer.vocab_size} "
            "tokens; give at least so many"
        )
    manifest = Manifest(
        step=0,
        sequences_seen=0,
        tokens_seen=0,
        adam_steps=0,
        precision=config.precision,
        seq_len=config.seq_len,
        seed=config.seed,
        corpus=data.fingerprint,
        model=asdict(model),
        attention=OmegaConf.to_container(config.attention),
        written_by=f"{config.engine.name}, ZeRO {config.engine.zero_stage}, {world} ranks, "
        f"parallel.cp={config.parallel.cp}",
    )
    if config.eval.every:
        make_probes(config, data)
        if not config.eval.probes and (data.held_out is None or not config.eval.sequences):
            raise ConfigError(
                f"eval.every={config.eval.every}: nothing to evaluate; give eval.holdout or "
                "eval.root (and eval.sequences above 0), or eval.probes"
            )
    resume, remarks = checkpoint.find(str(config.checkpoint.resume), run_dir)
    for found in resume:
        checkpoint.check(*found, manifest)
    source: states.Source = states.Fresh(model, config.seed)
    if path is not None:
        with path_errors("model.path", path):
            try:
                source = Pretrained(Path(path).expanduser(), shapes(model))
            except UnknownModel as error:
                raise ConfigError(f"model.path: {error}") from None
    hardware = hardware_of(config)
    return Job(config, model, data, run_dir, manifest, source, resume, remarks, hardware)
