"""Hardware descriptions on disk: by name in ringattn.configs, this machine's own, or a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from ringattn.cost.hardware import Hardware, HardwareError


def names() -> list[str]:
    """Of the descriptions that come with ringattn."""
    folder = files("ringattn.configs") / "machines"
    return sorted(x.name.removesuffix(".yaml") for x in folder.iterdir() if x.name[0] != "_")


def here() -> Path:
    """Where ``ringattn calibrate`` writes what ``hardware=this`` reads."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "ringattn" / "this.yaml"


def load(name: str) -> Hardware:
    """The description called ``name``: of :func:`names`, "this", or a file ending in .yaml.

    Raises HardwareError.
    """
    if name == "this":
        path = here()
        if not path.exists():
            raise HardwareError("hardware=this: not measured yet; run ringattn calibrate")
    elif name in names():
        path = files("ringattn.configs") / "machines" / f"{name}.yaml"
    elif name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
    else:
        legal = ", ".join([*names(), "this"])
        raise HardwareError(f"hardware={name} is unknown; one of: {legal}, or a .yaml file")
    try:
        description = yaml.safe_load(path.read_text())
    except OSError as error:
        raise HardwareError(f"hardware={name}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise HardwareError(f"hardware={name}: this is no YAML file") from None
    if not isinstance(description, Mapping):
        raise HardwareError(f"hardware={name}: a mapping is needed; ringattn calibrate writes one")
    try:
        return Hardware.read(description)
    except HardwareError as error:
        raise HardwareError(f"hardware={name}: {error}") from None


USUAL = "h100"  # where nothing is said


@cache
def usual() -> Hardware:
    """What plans and estimates count on where nothing is said."""
    return load(USUAL)


def write(description: Mapping[str, Any], path: Path) -> None:
    """As YAML, numbers rounded to four digits: more were not measured."""

    def rounded(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: rounded(x) for key, x in value.items()}
        return float(f"{value:.4g}") if isinstance(value, float) else value

    text = yaml.safe_dump(rounded(description), sort_keys=False, width=100)
    path.write_text(text)
