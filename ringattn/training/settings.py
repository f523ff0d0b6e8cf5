"""From the command line to a checked configuration. Every mistake is one line that names the key,
what was given and what is legal, and is found before torch.distributed or a model exists.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ringattn.cost.hardware import Hardware, HardwareError
from ringattn.cost.presets import here
from ringattn.cost.presets import load as load_hardware
from ringattn.data import packing, records
from ringattn.heads import check_degree
from ringattn.layouts import NAMES as LAYOUTS
from ringattn.models import hf_config
from ringattn.models.rope_config import TYPES as ROPE_TYPES
from ringattn.models.rope_config import RopeConfig
from ringattn.schedules import BUILDERS as SCHEDULES

# For configs: ${times:a,b}, as of the tokens of all ranks.
OmegaConf.register_new_resolver("times", lambda *factors: math.prod(factors), replace=True)


class ConfigError(ValueError):
    """A key with a value that cannot be used."""


Rule = Callable[[Any], str | None]  # what is legal, in words, if the value is not; else None


def _integer(least: int) -> Rule:
    def rule(value: Any) -> str | None:
        fits = isinstance(value, int) and not isinstance(value, bool)
        if fits and least <= value < 2**63:
            return None
        return f"an integer of at least {least}" + (
            " and below 2**63" if fits and value > 0 else ""
        )

    return rule


def _number(least: float, most: float = math.inf, above: bool = False) -> Rule:
    """A finite number in [least, most]; with ``above``, ``least`` itself is excluded."""

    def rule(value: Any) -> str | None:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        fits = fits and math.isfinite(value) and least <= value <= most
        if fits and not (above and value == least):
            return None
        bound = f"above {least:g}" if above else f"of at least {least:g}"
        return f"a finite number {bound}" + (f" and at most {most:g}" if most < math.inf else "")

    return rule


def _choice(*legal: Any) -> Rule:
    def rule(value: Any) -> str | None:
        fits = any(value == x and type(value) is type(x) for x in legal)
        return None if fits else f"one of: {', '.join(map(str, legal))}"

    return rule


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) and value else "text"


def _betas(value: Any) -> str | None:
    fits = isinstance(value, list) and len(value) == 2 and not any(map(_number(0, 1), value))
    return None if fits and max(value) < 1 else "two numbers of at least 0 and below 1"


def _list_of(rule: Rule) -> Rule:
    def each(value: Any) -> str | None:
        if not isinstance(value, list):
            return "a list, as [A,B]"
        legal = next((legal for item in value if (legal := rule(item))), None)
        return legal and f"a list, each of it {legal}"

    return each


def _mix(value: Any) -> str | None:
    """Several sources: what differs from the keys of ``data``, and how much of each."""
    keys = {"root": _text, "weight": _number(0, above=True), "glob": _text, "field": _text,
            "split": _text, "format": _choice("auto", *records.FORMATS, "tokens")}  # fmt: skip
    legal = (
        "a list of at least two {root: PATH, weight: NUMBER above 0}, each with glob, format, "
        "field or split where it differs"
    )
    if not isinstance(value, list) or len(value) < 2:
        return legal
    for part in value:
        if not isinstance(part, dict) or not {"root", "weight"} <= set(part) <= set(keys):
            return legal
        if any(keys[key](given) for key, given in part.items()):
            return legal
    return None


def _steps(value: Any) -> str | None:
    fits = isinstance(value, list) and len(value) == 2 and not any(map(_integer(1), value))
    return None if fits and value[0] <= value[1] else "the first and the last step, as [3,4]"


def _or_null(rule: Rule) -> Rule:
    def either(value: Any) -> str | None:
        legal = None if value is None else rule(value)
        return legal and f"null or {legal}"

    return either


def _auto_or(rule: Rule) -> Rule:
    def either(value: Any) -> str | None:
        legal = None if value == "auto" else rule(value)
        return legal and f"auto or {legal}"

    return either


# Every key of a run and what it may hold. A key that is not here is refused, wherever it came from.
RULES: dict[str, Rule] = {
    "seq_len": _integer(1),
    "batch_size": _integer(1),
    "precision": _choice("fp32", "bf16"),
    "seed": _integer(0),
    "run_dir": _or_null(_text),
    "kernel": _choice("auto", "gluon", "triton", "aten", "reference"),
    "device": _choice("auto", "cpu", "cuda"),
    "hardware": _or_null(_text),
    "ranks": _or_null(_integer(1)),
    "peak_flops": _or_null(_number(0, above=True)),
    "model.path": _or_null(_text),
    "model.dim": _integer(1),
    "model.layers": _integer(1),
    "model.heads": _integer(1),
    "model.kv_heads": _integer(1),
    "model.head_dim": _integer(1),
    "model.ffn_dim": _integer(1),
    "model.vocab_size": _integer(1),
    "model.rope.type": _choice(*ROPE_TYPES),
    "model.rope.theta": _number(1, above=True),
    "model.rope.factor": _or_null(_number(1)),
    "model.rope.original_length": _or_null(_integer(1)),
    "model.rope.beta_fast": _number(0, above=True),
    "model.rope.beta_slow": _number(0, above=True),
    "model.rope.low_freq_factor": _number(0, above=True),
    "model.rope.high_freq_factor": _number(0, above=True),
    "model.rope.attention_factor": _or_null(_number(0, above=True)),
    "model.norm_eps": _number(0, above=True),
    "model.tied": _choice(True, False),
    "model.qkv_bias": _choice(True, False),
    "model.qk_norm": _choice(True, False),
    "data.root": _or_null(_text),
    "data.glob": _text,
    "data.format": _choice("auto", *records.FORMATS, "tokens", "passkey", "recall"),
    "data.field": _text,
    "data.split": _text,
    "data.tokenizer": _or_null(_text),
    "data.end": _or_null(_text),
    "data.packing": _choice(*packing.NAMES),
    "data.mix": _or_null(_mix),
    "data.max_corrupt": _integer(0),
    "data.cache": _or_null(_text),
    "data.workers": _or_null(_integer(1)),
    "eval.every": _integer(0),
    "eval.sequences": _integer(0),
    "eval.holdout": _number(0, 0.5),
    "eval.root": _or_null(_text),
    "eval.probes": _list_of(_choice("passkey", "recall")),
    "eval.lengths": _or_null(_list_of(_integer(1))),
    "eval.depths": _list_of(_number(0, 1)),
    "eval.samples": _integer(1),
    "attention.name": _choice("documents", "causal"),
    "attention.window": _or_null(_auto_or(_integer(1))),
    "attention.sinks": _integer(0),
    "memory.checkpoint": _choice(True, False),
    "memory.offload": _choice(True, False),
    "memory.ffn_tile": _or_null(_integer(1)),
    "memory.loss_chunk": _or_null(_integer(1)),
    "memory.loss": _choice("chunked", "liger"),
    "memory.limit": _or_null(_number(0, above=True)),
    "engine.name": _choice("deepspeed", "fsdp"),
    "engine.zero_stage": _choice(0, 1, 2, 3),
    "engine.shard": _choice("world", "context"),
    "engine.offload_optimizer": _choice(True, False),
    "engine.offload_params": _choice(True, False),
    "logger.name": _choice("wandb", "none"),
    "logger.mode": _choice("offline", "online"),
    "logger.project": _text,
    "logger.group": _or_null(_text),
    "profile.steps": _or_null(_steps),
    "parallel.cp": _or_null(_integer(1)),
    "parallel.ulysses": _or_null(_integer(1)),
    "parallel.schedule": _choice(*SCHEDULES, "auto"),
    "parallel.node_size": _or_null(_integer(1)),
    "parallel.layout": _choice(*LAYOUTS),
    "parallel.timeout_s": _number(1, 1e6),
    "optim.lr": _number(0),
    "optim.min_lr_ratio": _number(0, 1),
    "optim.warmup_tokens": _integer(0),
    "optim.weight_decay": _number(0),
    "optim.betas": _betas,
    "optim.clip": _number(0),
    "train.steps": _integer(1),
    "train.grad_accum": _integer(1),
    "train.max_skipped": _integer(0),
    "train.sample_tokens": _integer(0),
    "train.sample_prompt": _text,
    "checkpoint.every": _or_null(_integer(0)),
    "checkpoint.keep": _or_null(_integer(1)),
    "checkpoint.background": _choice(True, False),
    "checkpoint.resume": _text,
}
PARENTS = {key.rsplit(".", n)[0] for key in RULES for n in (1, 2) if key.count(".") >= n}


def load(overrides: list[str]) -> DictConfig:
    """The composed, resolved configuration with every value checked by itself.

    Raises ConfigError.
    """
    for override in overrides:
        if "=" not in override.lstrip("~")[1:] and not override.startswith("~"):
            raise ConfigError(f"{override!r} is not an override; write KEY=VALUE")
        key = override.split("=", 1)[0].lstrip("+~").split("@")[0]
        _known(key, {*RULES, *PARENTS, "experiment"})
    try:
        with initialize_config_module("ringattn.configs", version_base="1.3"):
            config = compose("config", overrides)
            OmegaConf.resolve(config)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(" ".join(lines)) from None
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"{missing[0]} must be given, as {missing[0]}=VALUE")
    window = _fill_model(config)
    if config.attention.get("window") == "auto":
        config.attention.window = window
    given = dict(_leaves(OmegaConf.to_container(config)))
    for key in given:
        _known(key, set(RULES))
    for key, rule in RULES.items():
        if key not in given:
            raise ConfigError(f"{key} is missing; give it as {key}=VALUE")
        if legal := rule(given[key]):
            raise ConfigError(f"{key} must be {legal}; got {given[key]!r}")
    return config


def _fill_model(config: DictConfig) -> int | None:
    """Takes what ``model.*`` leaves open from the config.json in ``model.path``; returns the
    model's sliding window. Of what is given there, only RoPE may differ: to extend the context.
    """
    model = config.model
    if not isinstance(model, DictConfig) or not isinstance(model.get("path"), str):
        return None
    with path_errors("model.path", model.path):
        try:
            found, window = hf_config.read(Path(model.path).expanduser())
        except hf_config.UnknownModel as error:
            raise ConfigError(f"model.path: {error}") from None
    rope = found.pop("rope")
    for key, value in found.items():
        if model.get(key) is not None and model[key] != value:
            raise ConfigError(
                f"model.{key}={model[key]}: the model in model.path={model.path} has {value}"
            )
        model[key] = value
    if isinstance(model.get("rope"), DictConfig):
        same = model.rope.get("type") in (None, rope["type"])
        usual = {f.name: f.default for f in fields(RopeConfig)}
        for key, value in model.rope.items():
            keeps = same or key in ("theta", "original_length")
            if value is None and key in usual:
                model.rope[key] = rope.get(key, usual[key]) if keeps else usual[key]
    return window


def _known(key: str, legal: set[str]) -> None:
    if key not in legal:
        near = difflib.get_close_matches(key, legal, 3, 0.5)
        near = near or sorted({known.split(".")[0] for known in legal})
        raise ConfigError(f"unknown key {key!r}; did you mean: {', '.join(near)}?")


def _leaves(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + str(key), value


def check(config: DictConfig, world: int) -> None:
    """What depends on the world, and the defaults of ``parallel.cp`` and ``node_size``.

    Raises ConfigError.
    """
    if config.ranks not in (None, world):
        raise ConfigError(f"ranks={config.ranks}: this run has {world}; start it with --multirun")
    if config.parallel.cp is None:
        config.parallel.cp = world
    _check_engine(config)
    hardware_of(config)
    if world % config.parallel.cp:
        legal = [d for d in range(1, world + 1) if world % d == 0]
        raise ConfigError(
            f"parallel.cp={config.parallel.cp} does not divide the world of {world} ranks; "
            f"choose one of: {', '.join(map(str, legal))}"
        )
    parallel = config.parallel
    if parallel.node_size is None:
        parallel.node_size = math.gcd(int(os.environ.get("LOCAL_WORLD_SIZE", world)), parallel.cp)
    if parallel.cp % parallel.node_size:
        legal = [d for d in range(1, parallel.cp + 1) if parallel.cp % d == 0]
        raise ConfigError(
            f"parallel.node_size={parallel.node_size} does not divide parallel.cp={parallel.cp}; "
            f"choose one of: {', '.join(map(str, legal))}"
        )
    if parallel.ulysses is not None:
        try:
            check_degree(parallel.ulysses, parallel.cp, config.model.heads)
        except ValueError as error:
            raise ConfigError(f"parallel.{error}") from None
        if parallel.node_size % parallel.ulysses and parallel.ulysses % parallel.node_size:
            raise ConfigError(
                f"parallel.ulysses={parallel.ulysses} and parallel.node_size="
                f"{parallel.node_size}: one must divide the other"
            )


def hardware_of(config: DictConfig) -> Hardware | None:
    """The description that ``hardware`` names; "auto" is that of this machine, if it has been
    measured. Raises ConfigError."""
    name = config.hardware
    if name is None or (name == "auto" and not here().exists()):
        return None
    try:
        hardware = load_hardware("this" if name == "auto" else name)
        hardware.flops(config.precision)
    except HardwareError as error:
        advice = "; run ringattn calibrate again, or give hardware=null" if name == "auto" else ""
        raise ConfigError(f"{error}{advice}") from None
    return hardware


def _check_engine(config: DictConfig) -> None:
    engine, memory = config.engine, config.memory
    if memory.offload and not memory.checkpoint:
        raise ConfigError("memory.offload=true needs memory.checkpoint=true")
    if memory.loss == "liger" and importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError(
            "memory.loss=liger: liger-kernel is not installed; pip install liger-kernel"
        )
    if engine.name == "fsdp":
        if engine.zero_stage < 2:
            raise ConfigError(
                f"engine.zero_stage={engine.zero_stage}: engine=fsdp has 2 (weights stay gathered "
                "between forward and backward) and 3"
            )
        if engine.offload_optimizer and not engine.offload_params:
            raise ConfigError(
                "engine.offload_optimizer=true: engine=fsdp offloads weights and optimizer "
                "together; give engine.offload_params=true"
            )
        return
    if engine.shard != "world":
        raise ConfigError(f"engine.shard={engine.shard}: engine=deepspeed has world only")
    if engine.offload_params and engine.zero_stage < 3:
        raise ConfigError("engine.offload_params=true needs engine.zero_stage=3")
    if engine.offload_optimizer and engine.zero_stage < 1:
        raise ConfigError("engine.offload_optimizer=true needs engine.zero_stage of at least 1")


@contextmanager
def path_errors(key: str, given: Any) -> Iterator[None]:
    """Turns what a file system says about ``key`` into a ConfigError."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename and error.filename != given else ""
        raise ConfigError(f"{key}={given}: {where}{error.strerror}") from None
    except RuntimeError as error:  # "~nobody"
        raise ConfigError(f"{key}={given}: {error}") from None


def writable(run_dir: Path) -> None:
    """Raises OSError if nothing can be written at ``run_dir``; leaves nothing behind."""
    parent = run_dir
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    # Only a real attempt tells: access bits say nothing of read-only or special file systems.
    with tempfile.TemporaryDirectory(dir=parent):
        pass
