"""A run as a typed value: every key of train.py, each group defined beside the code that owns it.

:mod:`ringattn.training.config` makes one of a command line. Functions take the part they need.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ringattn.cost import Hardware
from ringattn.data.settings import Data
from ringattn.kernels import NAMES as KERNELS
from ringattn.models.key_sets import KeySets
from ringattn.models.lora_config import Lora
from ringattn.models.memory import Memory
from ringattn.models.mixer_config import ModuleMixer
from ringattn.models.sizes import MixedConfig, ModelConfig
from ringattn.planning.layer_plans import NONE
from ringattn.planning.layouts import NAMES as LAYOUTS
from ringattn.planning.schedules import BUILDERS as SCHEDULES
from ringattn.strategy import Strategy
from ringattn.training.attention import Attention
from ringattn.training.checkpoints.settings import Checkpoint
from ringattn.training.engines import EngineSettings
from ringattn.training.evaluating.settings import Eval
from ringattn.training.observing.loggers import LoggerSettings
from ringattn.training.optimizer import Optimizer
from ringattn.typed import Count, Flag, OneOf, Positive, Text, Whole, Words, settings


@settings
class Model(ModelConfig):
    """The decoder: as in Llama, Mistral, Qwen 2 and 3, Gemma 2 and 3, Olmo 3."""

    path: Text | None = None
    """Folder of a Hugging Face checkpoint (model=hf, model=transformers): sizes and weights come
    from there."""
    unchanged: Flag = False
    """Train transformers' own module of model.path (model=transformers), not our decoder."""
    total: Count | None = None
    """Of an unchanged module: its parameters."""
    active: Count | None = None
    """Of an unchanged module: the matrix parameters that a token meets."""
    adapters: Count | None = None
    """Of an unchanged module: the parameters of its adapters (model.lora): all that is trained."""
    lora: Lora

    @model_validator(mode="after")
    def _is_somebodys(self) -> Model:
        if self.unchanged and self.path is None:
            raise ValueError("model.unchanged=true needs model.path")
        if self.lora.rank and not self.unchanged:
            raise ValueError(
                f"model.lora.rank={self.lora.rank}: adapters are for unchanged modules; give "
                "model=transformers"
            )
        return self

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.total or ModelConfig.parameters.fget(self)

    @property
    def trained(self) -> int:
        """Those of them that are trained."""
        return self.adapters or self.parameters

    @property
    def matmul_parameters(self) -> int:
        """Parameters that multiply every token."""
        return self.active or ModelConfig.matmul_parameters.fget(self)

    @property
    def sizes(self) -> ModelConfig:
        """Without where the weights come from."""
        return ModelConfig(**{f.name: getattr(self, f.name) for f in fields(ModelConfig)})


@settings
class MixedModel(MixedConfig, Model):
    """An unchanged module of which some layers carry a state in place of attention."""


@settings
class Parallel:
    """How a sequence is split over ranks."""

    cp: Count | None = None
    """Ranks that share a sequence; null: all of them."""
    ulysses: Count | None = None
    """Ranks that split the heads among them; null: 1, or what auto chooses."""
    schedule: Annotated[Any, OneOf(*SCHEDULES, "auto")] = "ring"
    """How keys and values travel; auto: the cheapest by the cost model."""
    node_size: Count | None = None
    """Ranks of cp with a fast link; null: those of one machine."""
    layout: Annotated[Any, OneOf(*LAYOUTS)] = "zigzag"
    """Which rank owns which tokens."""
    timeout_s: Annotated[float, Field(strict=True, ge=1, le=1e6)] = 600.0
    """An exchange that takes longer is an error."""

    def strategy(
        self,
        model: ModelConfig,
        hardware: Hardware | None = None,
        sets: Mapping[str, KeySets] | None = None,
    ) -> Strategy:
        """How masks are split; ``hardware``: what a schedule of "auto" counts on; ``sets``: of the
        kinds of layer that attend sets of keys. ``cp`` must be known."""
        return Strategy(
            cp=self.cp,
            layout=self.layout,
            schedule=self.schedule,
            ulysses=self.ulysses,
            node_size=self.node_size,
            heads=model.heads,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            hardware=hardware,
            sets=sets or {},
        )


@settings
class Train:
    """How long training goes on, and what comes after."""

    steps: Whole = 600
    """Optimizer steps; 0: only evaluates, with eval.first."""
    grad_accum: Count = 1
    """Micro-steps of an optimizer step."""
    max_skipped: Whole = 3
    """Steps in a row whose loss or gradient is not finite; one more ends the run."""
    sample_tokens: Whole = 240
    """Generated at the end; 0: none."""
    sample_prompt: Text = "def "
    """What the sample begins with."""


@settings
class Profile:
    """A trace by torch.profiler, with the plan's steps named."""

    steps: Annotated[
        Annotated[list[Count], Field(min_length=2, max_length=2)] | None,
        Words("null or the first and the last step, as [3,4]"),
    ] = None
    """[first, last]: the steps that are traced; null: none."""

    @model_validator(mode="after")
    def _ascends(self) -> Profile:
        if self.steps and self.steps[0] > self.steps[1]:
            raise ValueError(
                "profile.steps must be null or the first and the last step, as [3,4]; got "
                f"{self.steps}"
            )
        return self


@settings
class TrainingRun:
    """A training run."""

    seq_len: Count = 2048
    """Tokens of a sequence, over all of its ranks."""
    batch_size: Count = 1
    """Sequences per data-parallel rank and micro-step."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What is computed in; weights and optimizer stay float32."""
    seed: Whole = 0
    """Of weights and of the order of data."""
    run_dir: Text | None = None
    """Where the run is written; null: runs/DATE-TIME."""
    kernel: Annotated[Any, OneOf("auto", *KERNELS)] = "auto"
    """The block kernel: gluon (Hopper), triton (a GPU), aten, reference."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: GPUs if this machine has one for each of its processes."""
    hardware: Text | None = "auto"
    """h100, h200, b200, mi300x or a .yaml file, for forecasts; auto: this machine's, once
    `ringattn calibrate` has measured it; null: none."""
    ranks: Count | None = None
    """Processes: of `ringattn estimate`, and of a job that --multirun starts; null: 2."""
    peak_flops: Positive | None = None
    """Per rank, what MFU divides by; null: the hardware's, or a matrix product measured at
    start."""
    model: Model
    data: Data
    attention: Attention
    memory: Memory
    engine: EngineSettings
    logger: LoggerSettings
    parallel: Parallel
    optim: Optimizer
    train: Train
    eval: Eval
    profile: Profile
    checkpoint: Checkpoint

    @model_validator(mode="after")
    def _mask_fits(self) -> TrainingRun:
        if not self.train.steps and not self.eval.first:
            raise ValueError("train.steps=0: nothing to do; with eval.first=true it evaluates")
        self.attention.check(self.seq_len)
        mixers, sets = self.attention.mixers, self.attention.sets
        kinds = set(self.attention.layers(self.model.layers)) - {NONE} - set(mixers)
        if mixers and self.model.path is not None and not self.model.unchanged:
            raise ValueError(
                f"attention.kinds.{next(iter(mixers))}: the model in model.path="
                f"{self.model.path} has no weights for a mixer; a hybrid of transformers is "
                "model=transformers"
            )
        if mixers and self.parallel.layout == "striped":
            raise ValueError(
                f"parallel.layout=striped: with attention.kinds.{next(iter(mixers))} a state would "
                "travel with every token; take contiguous, zigzag or balanced"
            )
        for kind, own in sets.items():
            self._check_sets(f"attention.kinds.{kind}", own)
        if "none" in self.attention.texts.values() and not self.model.unchanged:
            raise ValueError(
                "attention.kinds: none is for unchanged modules (model=transformers), whose layers "
                "without attention are their own"
            )
        if unknown := sorted(set(self.model.rope_kinds or ()) - kinds):
            raise ValueError(
                f"model.rope_kinds: no layer is of kind {', '.join(unknown)}; there are "
                f"{', '.join(sorted(kinds))} (attention.kinds)"
            )
        return self

    def _check_sets(self, key: str, sets: KeySets) -> None:
        """Raises ValueError, naming the key, where a kind of layer with sets of keys does not fit
        the run."""
        model = self.model
        if model.unchanged:
            raise ValueError(
                f"{key}: layers of an unchanged module (model=transformers) attend by their masks; "
                f"{sets.mixer} is for the decoder of this project (model=hf loads Llama's and "
                "Qwen's weights into it)"
            )
        if model.path is not None and sets.learns:
            raise ValueError(
                f"{key}: the model in model.path={model.path} has no weights for {sets.mixer}; of "
                "pretrained models layers may be moba, pooled (how mean or max), hashed or "
                "scatterbrain"
            )
        if model.softcap is not None or model.sinks:
            raise ValueError(f"{key}: {sets.mixer} has neither model.softcap nor model.sinks")
        if self.parallel.layout == "striped":
            raise ValueError(
                f"parallel.layout=striped: with {key} every block would lie on all ranks; take "
                "contiguous, zigzag or balanced"
            )

    @property
    def sizes(self) -> ModelConfig:
        """Of the model that is trained, with the mixers of its layers."""
        if not self.attention.mixers and not self.attention.sets:
            return self.model if self.model.unchanged else self.model.sizes
        base = self.model if self.model.unchanged else self.model.sizes
        return (MixedModel if self.model.unchanged else MixedConfig)(
            **{f.name: getattr(base, f.name) for f in fields(base)},
            kinds=self.attention.layers(base.layers),
            mixers={
                kind: ModuleMixer(**asdict(mixer)) if self.model.unchanged else mixer.of(base)
                for kind, mixer in self.attention.mixers.items()
            }
            | self.attention.sets,
        )


def with_keys(run: TrainingRun, **changed: dict[str, Any]) -> TrainingRun:
    """``run`` with some keys of some groups changed: ``with_keys(run, parallel={"cp": 2})``."""
    groups = {name: replace(getattr(run, name), **keys) for name, keys in changed.items()}
    return replace(run, **groups)
