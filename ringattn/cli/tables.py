"""Tables for people; what is piped is never cut off."""

from __future__ import annotations

from rich.console import Console

_LEAST = 110  # columns that a terminal is taken to have
_PIPED = 400


def wide_console() -> Console:
    """A console as wide as its tables: lines of text are to be printed with ``soft_wrap``."""
    console = Console(highlight=False)
    console.width = max(console.width, _LEAST) if console.is_terminal else _PIPED
    return console
