"""Loggers: where the numbers of a run go beside its own files.

A logger is a settings type with a name that opens a :class:`Log`. To add one: its file, and its
line in ``LOGGERS``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Protocol, Union

from pydantic import Field

from ringattn.training.observing.loggers.nothing import Nothing
from ringattn.training.observing.loggers.wandb_log import Wandb

LOGGERS = (Wandb, Nothing)
LoggerSettings = Annotated[Union[LOGGERS], Field(discriminator="name")]  # noqa: UP007


class Log(Protocol):
    """One run at one logger, on rank 0."""

    def describe(self, facts: dict[str, Any]) -> None:
        """What is known before the first step: plan, forecast, hardware, versions."""

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Numbers of a step."""

    def draw(self, step: int, pictures: dict[str, Path]) -> None:
        """Pictures by name."""

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None: ...

    def close(self) -> None: ...
