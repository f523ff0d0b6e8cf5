"""wandb: one run for each run directory, also where that is resumed."""

from __future__ import annotations

import re
import secrets
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from ringattn.refusal import advice
from ringattn.typed import SettingsError, Text, settings

ID = "wandb_id"  # the file of a run directory that holds its id


@settings
class Wandb:
    """One wandb run, by rank 0."""

    name: Literal["wandb"] = "wandb"
    """wandb, or none."""
    mode: Literal["offline", "online"] = "offline"
    """offline: files that `wandb sync` sends; online: as training goes on."""
    project: Text = "ringattn"
    """Where the run is filed."""
    group: Text | None = None
    """Runs that belong together; --multirun gives its own."""

    def check(self) -> None:
        """Raises SettingsError if wandb is not installed, or if metrics are to be sent and there is
        no key to send them with."""
        if find_spec("wandb") is None:
            raise SettingsError(f"logger=wandb {advice('wandb')}, or give logger=none")
        if self.mode == "online":
            import wandb

            if not wandb.login(prompt=False, verify=False):
                raise SettingsError(
                    "logger.mode=online: no API key; run `wandb login`, set WANDB_API_KEY, or give "
                    "logger.mode=offline"
                )

    def open(self, run_dir: Path, config: dict[str, Any]) -> WandbLog:
        return WandbLog(self, run_dir, config)


class WandbLog:
    """A :class:`ringattn.training.observing.loggers.Log`. Raises SettingsError."""

    def __init__(self, keys: Wandb, run_dir: Path, config: dict[str, Any]) -> None:
        import wandb

        path = run_dir / ID
        if not path.exists():
            path.write_text(secrets.token_hex(4))
        name = path.read_text().strip()
        if not re.fullmatch(r"[^:;,#?/'\s]{1,64}", name):
            raise SettingsError(
                f"{path} holds {name[:40]!r}, which is no id of a wandb run; write the id there, "
                "or remove the file for a new run"
            )
        try:
            self.run = self._init(keys, run_dir, name, config)
        except wandb.errors.Error as error:
            raise SettingsError(f"logger=wandb: {' '.join(str(error).split())}") from None

    def _init(self, keys: Wandb, run_dir: Path, name: str, config: dict[str, Any]) -> Any:
        import wandb

        return wandb.init(
            id=name,
            resume="allow" if keys.mode == "online" else None,
            project=keys.project,
            group=keys.group,
            name=run_dir.name,
            dir=str(run_dir),
            mode=keys.mode,
            config=config,
            settings=wandb.Settings(silent=True, console="off"),
        )

    def describe(self, facts: dict[str, Any]) -> None:
        self.run.config.update(facts, allow_val_change=True)

    def write(self, step: int, values: dict[str, Any]) -> None:
        self.run.log(values, step=step)

    def draw(self, step: int, pictures: dict[str, Path]) -> None:
        import wandb

        self.run.log({name: wandb.Image(str(file)) for name, file in pictures.items()}, step=step)

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        import wandb

        self.run.log({name: wandb.Table(columns=columns, data=rows)})

    def close(self) -> None:
        self.run.finish()
