"""Checkpoints: every rank's file (see ``states``) plus one manifest that is written last.

A folder without its manifest is unfinished and is passed over. The manifest has the size and hash
of every file, so a damaged checkpoint is named and passed over too, and it says what the weights
belong to, so one of another model is refused before any model is built.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ringattn import typed
from ringattn.models.sizes import ModelConfig
from ringattn.training.attention import Attention
from ringattn.training.checkpoints import states
from ringattn.training.config import path_errors
from ringattn.training.engines import Engine
from ringattn.training.observing.loggers.wandb_log import ID
from ringattn.training.observing.metrics import LINES
from ringattn.typed import SettingsError

MANIFEST = "ringattn.json"
FORMAT = 2
OTHER_DATA = (
    " (fingerprints of the data: other text, another tokenizer or its keys, another packing; or a "
    "checkpoint of a version before 2026-11-30, which knew text by the names and sizes of files)"
)
HISTORY = (*LINES, "config.yaml", "facts.json", ID)


class Damaged(RuntimeError):
    """No checkpoint that can be continued is whole."""


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; earlier ones are intact."""


@dataclass(frozen=True)
class Manifest:
    """Where a run stood, and what must be equal to continue it."""

    step: int
    sequences_seen: int
    tokens_seen: int
    adam_steps: int  # fewer than ``step`` if steps were skipped
    precision: str
    seq_len: int
    seed: int
    corpus: str
    model: dict[str, Any]
    attention: dict[str, Any]
    written_by: str  # engine and world, for people
    schedule: dict[str, Any] = field(default_factory=dict)  # of the learning rate; none: not known
    files: dict[str, list[Any]] = field(default_factory=dict)  # name: [bytes, SHA-256]
    format: int = FORMAT


Found = tuple[Path, Manifest]


def folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step}"


def find(
    resume: str, run_dir: Path, key: str = "checkpoint.resume"
) -> tuple[list[Found], list[str]]:
    """Checkpoints to continue, the newest first, and what is wrong with those that are damaged:
    of the run (auto), none (never), or at the path named by ``key``.

    Sizes are compared here, hashes in :func:`first_sound`. Raises SettingsError when a named path
    holds no finished checkpoint, or all are damaged.
    """
    runs_own = key == "checkpoint.resume"  # then it may be auto or never
    if runs_own and resume == "never":
        return [], []
    with path_errors(key, resume):
        where = run_dir if runs_own and resume == "auto" else Path(resume).expanduser()
        candidates = [where, *where.glob("step_*"), *where.glob("checkpoints/step_*")]
        finished = [path for path in candidates if (path / MANIFEST).is_file()]
    sound, damaged = [], []
    for path in finished:
        try:
            manifest = _read(path)
            _check_sizes(path, manifest)
            sound.append((path, manifest))
        except ValueError as error:
            damaged.append(str(error))
    if damaged and not sound:
        raise SettingsError(
            f"{key}={resume}: {damaged[0]}; no other is left"
            + (" (checkpoint.resume=never starts anew)" if runs_own else "")
        )
    if not finished and not (runs_own and resume == "auto"):
        raise SettingsError(
            f"{key}={resume}: no finished checkpoint there (give {'auto, never, ' * runs_own}"
            "a run directory or a checkpoints/step_N folder)"
        )
    return sorted(sound, key=lambda checkpoint: -checkpoint[1].step), damaged


def _read(path: Path) -> Manifest:
    try:
        content = json.loads((path / MANIFEST).read_text())
        if isinstance(content, dict) and content.get("format", 1) != FORMAT:
            raise SettingsError(
                f"{path} is of checkpoint format {content.get('format', 1)}; this version reads "
                f"{FORMAT}"
            )
        # Keys that are younger than the checkpoint had the value that is now their default.
        for group, kind in (("model", ModelConfig), ("attention", Attention)):
            content[group] = typed.defaults(kind) | content[group]
        manifest = Manifest(**content)
        kinds = {f.name: f.type.split("[")[0] for f in fields(Manifest)}
        for name, value in asdict(manifest).items():
            if type(value).__name__ != kinds[name]:
                raise ValueError(f"{name} is {value!r}, which is no {kinds[name]}")
        return manifest
    except SettingsError:
        raise
    except (OSError, TypeError, ValueError, KeyError) as error:
        raise SettingsError(f"{path / MANIFEST} is damaged: {error}") from None


def _check_sizes(path: Path, manifest: Manifest) -> None:
    for name, (size, _) in manifest.files.items():
        file = path / name
        stored = file.stat().st_size if file.is_file() else None
        if stored != size:
            what = "is missing" if stored is None else f"has {stored} bytes, not {size}"
            raise SettingsError(f"{path} is damaged: {name} {what}")


def first_sound(candidates: list[Found]) -> tuple[Found | None, list[str]]:
    """Collective: the first whose files have their hashes, each rank reading a share of them; and
    what is wrong with those before it."""
    remarks = []
    rank, world = dist.get_rank(), dist.get_world_size()
    for path, manifest in candidates:
        bad = []
        for name in sorted(manifest.files)[rank::world]:
            try:
                if states.digest(path / name) != manifest.files[name][1]:
                    bad.append(f"{name} has changed since it was written")
            except OSError as error:
                bad.append(f"{name}: {error.strerror}")
        everyone: list[list[str]] = [[]] * world
        dist.all_gather_object(everyone, bad)
        problems = [remark for remarks in everyone for remark in remarks]
        if not problems:
            return (path, manifest), remarks
        remarks.append(f"{path} is damaged: {problems[0]}")
    return None, remarks


def check(path: Path, saved: Manifest, now: Manifest) -> None:
    """Raises SettingsError, naming the first key that keeps ``now`` from continuing ``saved``.

    Number of ranks, split, engine and ZeRO stage may all differ.
    """
    for group in ("model", "attention"):
        there, here = getattr(saved, group), getattr(now, group)
        for key in sorted(set(there) | set(here)):
            if there.get(key) != here.get(key):
                raise SettingsError(
                    f"checkpoint.resume: {path} holds another model: {group}.{key} is "
                    f"{there.get(key)} there and {here.get(key)} here"
                )
    for key, name in (
        ("precision", "precision"),
        ("seq_len", "seq_len"),
        ("seed", "seed"),
        ("corpus", "data"),
    ):
        if getattr(saved, key) != getattr(now, key):
            raise SettingsError(
                f"checkpoint.resume: {path} was written with {name}={getattr(saved, key)}, "
                f"this run has {getattr(now, key)}" + (OTHER_DATA if key == "corpus" else "")
            )


class Saver:
    """Writes checkpoints of a run; one at a time may be on its way while training goes on.

    All methods but :attr:`ready` are collective. ``keep``: how many finished ones stay (None: all).
    """

    def __init__(self, run_dir: Path, keep: int | None, background: bool) -> None:
        self.run_dir, self.keep, self.background = run_dir, keep, background
        self._pending: tuple[Path, Manifest, threading.Thread, dict[str, Any]] | None = None

    @property
    def ready(self) -> bool:
        """Whether this rank's part of a pending checkpoint is written, or has failed."""
        return self._pending is not None and not self._pending[2].is_alive()

    def save(self, engine: Engine, manifest: Manifest) -> None:
        """Raises SaveFailed on all ranks if this or the pending one cannot be written."""
        self.finish()
        path, rank = folder(self.run_dir, manifest.step), dist.get_rank()
        result: dict[str, Any] = {"name": f"rank_{rank:05}.safetensors"}
        if rank == 0:
            # What a killed run left here unfinished is written anew. If the run directory is
            # gone it is not made again: something else is wrong then.
            try:
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir()
            except OSError as error:
                result["error"] = _reason(error)
        dist.barrier()
        tensors = states.snapshot(engine)

        def work() -> None:
            try:
                result["file"] = list(states.write(path / result["name"], tensors))
            except Exception as error:  # it has to reach all ranks
                result["error"] = _reason(error)

        thread = threading.Thread(target=work, name="checkpoint")
        if "error" not in result:
            thread.start()
        self._pending = path, manifest, thread, result
        if not self.background:
            self.finish()

    def finish(self) -> None:
        """Waits for the pending checkpoint, if any, and publishes it. Raises SaveFailed on all
        ranks if any rank could not write its part; what there is of it is then removed."""
        if self._pending is None:
            return
        path, manifest, thread, result = self._pending
        if thread.ident is not None:
            thread.join()
        self._pending = None
        everyone: list[dict[str, Any]] = [{}] * dist.get_world_size()
        dist.all_gather_object(everyone, result)
        error = next((f"{r['name']}: {r['error']}" for r in everyone if "error" in r), None)
        if error is None and dist.get_rank() == 0:
            files = {r["name"]: r["file"] for r in everyone}
            try:
                _publish(path, replace(manifest, files=files))
                self._prune(path)
            except OSError as problem:
                error = f"{MANIFEST}: {_reason(problem)}"
        shared = [error]
        dist.broadcast_object_list(shared)
        if shared[0] is not None:
            if dist.get_rank() == 0:
                shutil.rmtree(path, ignore_errors=True)
            raise SaveFailed(f"the checkpoint {path} could not be written: {shared[0]}")

    def _prune(self, newest: Path) -> None:
        """Removes finished checkpoints beyond ``keep``, of which the one just published is one, and
        what kills have left unfinished before it."""
        finished = sorted(_finished(newest.parent), key=_number)
        for path in finished[: -self.keep] if self.keep is not None else []:
            (path / MANIFEST).unlink()  # first, so that a kill leaves an unfinished one
        for path in newest.parent.glob("step_*"):
            if 0 <= _number(path) < _number(newest) and not (path / MANIFEST).exists():
                shutil.rmtree(path)


def _finished(checkpoints: Path) -> list[Path]:
    """Those of this run; copies under other names are a person's own."""
    return [p for p in checkpoints.glob("step_*") if _number(p) >= 0 and (p / MANIFEST).is_file()]


def _number(path: Path) -> int:
    number = path.name.removeprefix("step_")
    return int(number) if number.isdecimal() else -1


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _publish(path: Path, manifest: Manifest) -> None:
    """Writes the manifest atomically: from here on the checkpoint exists."""
    draft = path / (MANIFEST + ".tmp")
    with draft.open("w") as file:
        json.dump(asdict(manifest), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path / MANIFEST)


def set_aside(run_dir: Path, resumed: Found | None) -> Path | None:
    """Moves what another history left in ``run_dir`` to ``superseded_N``; returns that folder.

    That is everything if this run starts anew or continues a checkpoint from elsewhere, and the
    checkpoints beyond the resumed step if it goes back. So nothing is lost or overwritten, and
    ``auto`` finds the checkpoints of one history only.
    """
    finished = _finished(run_dir / "checkpoints")
    continues = resumed is not None and resumed[0].resolve() in [p.resolve() for p in finished]
    if continues:
        stale = [p for p in finished if _number(p) > resumed[1].step]
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
    for path in (run_dir / name for name in HISTORY):
        if path.exists():
            # A run that goes back keeps the lines up to its step.
            shutil.copy(path, aside) if continues else path.rename(aside / path.name)
    return aside
