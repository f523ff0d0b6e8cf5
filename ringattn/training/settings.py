"""From the command line to a checked configuration. Every mistake is one line that names the key,
what was given and what is legal, and is found before torch.distributed or a model exists.
"""

from __future__ import annotations

import difflib
import math
import tempfile
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ringattn.data.corpus import VOCAB_SIZE
from ringattn.layouts import BUILDERS as LAYOUTS
from ringattn.schedules import BUILDERS as SCHEDULES


class ConfigError(ValueError):
    """A key with a value that cannot be used."""


def load(overrides: list[str]) -> DictConfig:
    """The composed and resolved configuration. Raises ConfigError."""
    try:
        with initialize_config_module("ringattn.configs", version_base="1.3"):
            config = compose("config", overrides)
            OmegaConf.resolve(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, overrides)) from None
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"{missing[0]} must be given, as {missing[0]}=VALUE")
    return config


def _explain(error: Exception, overrides: list[str]) -> str:
    """hydra's error in one line, with the nearest legal key where a key is unknown."""
    with initialize_config_module("ringattn.configs", version_base="1.3"):
        known = _keys(OmegaConf.to_container(compose("config")))
    for override in overrides:
        if "=" not in override:
            return f"{override!r} is not an override; write KEY=VALUE"
        key = override.split("=", 1)[0].lstrip("+~")
        # A group's keys depend on the choice (data.root with data=files): all of them are known.
        if key.split("@")[0] not in known:
            near = difflib.get_close_matches(key, known, 3, 0.5) or sorted(
                k for k in known if "." not in k
            )
            return f"unknown key {key!r}; did you mean: {', '.join(near)}?"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)


def _keys(tree: dict[Any, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in tree.items():
        keys.append(prefix + str(key))
        if isinstance(value, dict):
            keys += _keys(value, f"{prefix}{key}.")
    return keys


def check(config: DictConfig, world: int) -> None:
    """Ranges, choices and combinations, and the default of ``parallel.cp``. Raises ConfigError."""
    for key in ("seq_len", "batch_size", "train.steps", "train.grad_accum"):
        _integer(config, key, 1)
    for key in (
        "seed", "checkpoint.every", "train.sample_tokens", "optim.warmup_tokens", "attention.sinks",
    ):  # fmt: skip
        _integer(config, key, 0)
    if config.attention.window is not None:
        _integer(config, "attention.window", 1)
    if config.parallel.cp is None:
        config.parallel.cp = world
    _integer(config, "parallel.cp", 1)
    if world % config.parallel.cp:
        legal = [d for d in range(1, world + 1) if world % d == 0]
        raise ConfigError(
            f"parallel.cp={config.parallel.cp} does not divide the world of {world} ranks; "
            f"choose one of: {', '.join(map(str, legal))}"
        )
    _choice(config, "parallel.schedule", [*SCHEDULES])
    _choice(config, "parallel.layout", [*LAYOUTS])
    _choice(config, "parallel.ulysses", [1])
    _choice(config, "precision", ["fp32", "bf16"])
    _choice(config, "kernel", ["auto", "aten", "reference"])
    _choice(config, "device", ["auto", "cpu", "cuda"])
    _choice(config, "engine.name", ["deepspeed"])
    _choice(config, "engine.zero_stage", [0, 1, 2, 3])
    _choice(config, "logger.name", ["wandb", "none"])
    if config.logger.name == "wandb":
        _choice(config, "logger.mode", ["offline", "online"])
    for key in ("optim.lr", "optim.min_lr", "optim.weight_decay", "optim.clip"):
        _number(config, key, 0.0)
    _number(config, "parallel.timeout_s", 1.0)
    if config.peak_flops is not None:
        _number(config, "peak_flops", 1.0)
    betas = OmegaConf.to_container(config.optim).get("betas")
    if not (isinstance(betas, list) and len(betas) == 2 and all(
        isinstance(b, float) and 0 <= b < 1 for b in betas
    )):  # fmt: skip
        raise ConfigError(f"optim.betas must be two numbers in [0, 1), got {betas!r}")
    if isinstance(config.model, str) or "vocab_size" not in config.model:
        raise ConfigError("model must be one of the groups in configs/model")
    _integer(config, "model.vocab_size", 1)
    if config.model.vocab_size < VOCAB_SIZE:
        raise ConfigError(
            f"model.vocab_size must be at least {VOCAB_SIZE} for byte tokens, "
            f"got {config.model.vocab_size}"
        )


def _integer(config: DictConfig, key: str, least: int) -> None:
    value = OmegaConf.select(config, key)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{key} must be an integer of at least {least}, got {value!r}")


def _number(config: DictConfig, key: str, least: float) -> None:
    value = OmegaConf.select(config, key)
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not fits or not math.isfinite(value) or value < least:
        raise ConfigError(f"{key} must be a finite number of at least {least:g}, got {value!r}")


def _choice(config: DictConfig, key: str, legal: list[Any]) -> None:
    value = OmegaConf.select(config, key)
    if value not in legal or isinstance(value, bool):
        raise ConfigError(
            f"{key}={value} is not legal; choose one of: {', '.join(map(str, legal))}"
        )


def writable(run_dir: Path) -> None:
    """Raises ConfigError if nothing can be written at ``run_dir``; leaves nothing behind."""
    parent = run_dir
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    try:
        # Only a real attempt tells: access bits say nothing of read-only or special file systems.
        with tempfile.TemporaryDirectory(dir=parent):
            pass
    except OSError as error:
        raise ConfigError(
            f"run_dir={run_dir}: cannot write in {parent}: {error.strerror}"
        ) from None
