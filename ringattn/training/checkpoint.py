"""Checkpoints: the engine's own files plus one manifest that is written last.

A folder without its manifest is unfinished and is passed over. The manifest says what the
weights belong to, so a checkpoint of another model is refused before any model is built.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ringattn.training.settings import ConfigError, path_errors

MANIFEST = "ringattn.json"


@dataclass(frozen=True)
class Manifest:
    """Where a run stood, and what must be equal to continue it."""

    step: int
    sequences_seen: int
    tokens_seen: int
    world: int
    zero_stage: int
    precision: str
    seq_len: int
    seed: int
    corpus: str
    model: dict[str, Any]
    attention: dict[str, Any]


def folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step}"


def publish(path: Path, manifest: Manifest) -> None:
    """Writes the manifest atomically: from here on the checkpoint exists."""
    draft = path / (MANIFEST + ".tmp")
    with draft.open("w") as file:
        json.dump(asdict(manifest), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path / MANIFEST)


def find(resume: str, run_dir: Path) -> tuple[Path, Manifest] | None:
    """The checkpoint to continue: the newest of the run (auto), none (never), or the one named.

    Raises ConfigError when a named path holds no finished checkpoint.
    """
    if resume == "never":
        return None
    with path_errors("checkpoint.resume", resume):
        where = run_dir if resume == "auto" else Path(resume).expanduser()
        candidates = [where, *where.glob("step_*"), *where.glob("checkpoints/step_*")]
        finished = [(path, _read(path)) for path in candidates if (path / MANIFEST).is_file()]
    if finished:
        return max(finished, key=lambda found: found[1].step)
    if resume == "auto":
        return None
    raise ConfigError(
        f"checkpoint.resume={resume}: no finished checkpoint there "
        "(give auto, never, a run directory or a checkpoints/step_N folder)"
    )


def set_aside(run_dir: Path, resumed: tuple[Path, Manifest] | None) -> Path | None:
    """Moves what another history left in ``run_dir`` to ``superseded_N``; returns that folder.

    That is everything if this run starts anew or continues a checkpoint from elsewhere, and the
    checkpoints beyond the resumed step if it goes back. So nothing is lost or overwritten, and
    ``auto`` finds the checkpoints of one history only.
    """
    finished = [path for path in run_dir.glob("checkpoints/step_*") if (path / MANIFEST).is_file()]
    continues = resumed is not None and resumed[0].resolve() in [p.resolve() for p in finished]
    if continues:
        stale = [path for path in finished if _read(path).step > resumed[1].step]
        if not stale:
            return None
    else:
        stale = finished
        if not stale and not (run_dir / "metrics.jsonl").exists():
            return None
    taken = [path.name.removeprefix("superseded_") for path in run_dir.glob("superseded_*")]
    number = 1 + max((int(name) for name in taken if name.isdecimal()), default=0)
    aside = run_dir / f"superseded_{number}"
    aside.mkdir()
    for path in stale:
        path.rename(aside / path.name)
    for path in (run_dir / name for name in ("metrics.jsonl", "config.yaml", "wandb_id")):
        if path.exists():
            # A run that goes back keeps the lines up to its step.
            shutil.copy(path, aside) if continues else path.rename(aside / path.name)
    return aside


def _read(path: Path) -> Manifest:
    try:
        manifest = Manifest(**json.loads((path / MANIFEST).read_text()))
        kinds = {"precision": str, "corpus": str, "model": dict, "attention": dict}
        for name, value in asdict(manifest).items():
            kind = kinds.get(name, int)
            if not isinstance(value, kind):
                raise ValueError(f"{name} is {value!r}, which is no {kind.__name__}")
        return manifest
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"checkpoint.resume: {path / MANIFEST} is damaged: {error}") from None


def check(path: Path, saved: Manifest, now: Manifest) -> None:
    """Raises ConfigError, naming the first key that keeps ``now`` from continuing ``saved``."""
    for group in ("model", "attention"):
        there, here = getattr(saved, group), getattr(now, group)
        for key in sorted(set(there) | set(here)):
            if there.get(key) != here.get(key):
                raise ConfigError(
                    f"checkpoint.resume: {path} holds another model: {group}.{key} is "
                    f"{there.get(key)} there and {here.get(key)} here"
                )
    for key, name in (
        ("zero_stage", "engine.zero_stage"),
        ("precision", "precision"),
        ("seq_len", "seq_len"),
        ("seed", "seed"),
        ("corpus", "data"),
    ):
        if getattr(saved, key) != getattr(now, key):
            raise ConfigError(
                f"checkpoint.resume: {path} was written with {name}={getattr(saved, key)}, "
                f"this run has {getattr(now, key)}"
            )
    # At ZeRO 0 every rank holds everything; from stage 1 on the files are cut by rank.
    if saved.zero_stage > 0 and saved.world != now.world:
        raise ConfigError(
            f"checkpoint.resume: {path} was written by {saved.world} ranks with "
            f"engine.zero_stage={saved.zero_stage}; this run has {now.world} ranks"
        )
