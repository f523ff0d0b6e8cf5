"""Engines: who holds weights and optimizer state, and steps. The loop does not know which one it
drives.

An engine is a settings type with a name (its keys, its legality, its costs) that builds an
:class:`Engine`. To add one: its file, and its line in ``ENGINES``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Protocol, Union

from pydantic import Field

from ringattn.training.engines.deepspeed import DeepSpeed
from ringattn.training.engines.fsdp import FSDP

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ringattn.context import Attends, Context
    from ringattn.execution.carriers import Stopwatch
    from ringattn.models.decoder import Loss
    from ringattn.training.optimizer import Optimizer

ENGINES = (DeepSpeed, FSDP)
EngineSettings = Annotated[Union[ENGINES], Field(discriminator="name")]  # noqa: UP007

KINDS = ("weight", "exp_avg", "exp_avg_sq")  # what training keeps of a parameter, in float32


@dataclass(frozen=True)
class Fragment:
    """Elements ``start`` to ``start + count`` of a parameter, flattened: what this rank keeps of
    it. However an engine splits weights and optimizer state, the parts are such runs, so that a
    checkpoint of them fits any other split.

    ``read(kind)`` is a float32 tensor ``[count]`` and ``write(kind, value)`` sets it, kind from
    KINDS. ``copy`` of ``copies`` ranks hold the same fragment. Of one that is not ``trained`` there
    is only the weight, which never changes.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    count: int
    read: Callable[[str], torch.Tensor]
    write: Callable[[str, torch.Tensor], None]
    copy: int = 0
    copies: int = 1
    trained: bool = True

    @property
    def kinds(self) -> tuple[str, ...]:
        return KINDS if self.trained else KINDS[:1]


class Engine(Protocol):
    """A model with its optimizer, split over the world as its kind does it. What it does beside
    the model in ``backward`` is a section "engine" of ``watch``, where it can be told apart."""

    watch: Stopwatch
    root: nn.Module  # the model, with what the engine has put around it

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attend: Attends,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor | Loss:
        """As :class:`ringattn.models.decoder.Decoder`."""

    def backward(self, loss: torch.Tensor) -> None:
        """Adds to gradients that are means over the world and over ``train.grad_accum``."""

    def step(self) -> float | None:
        """After the last micro-step: clips, steps, and gives the norm of the gradient before
        clipping. If that is not finite, nothing but the gradients has changed. None after other
        micro-steps."""

    def set_lr(self, lr: float) -> None: ...

    def train(self, mode: bool) -> None: ...

    def fragments(self) -> Iterator[Fragment]:
        """This rank's part of every parameter, in the same order of names on all ranks."""

    def fragments_written(self, adam_steps: int) -> None:
        """Collective. To be called after fragments were written: what is computed with follows
        them, and the optimizer has made ``adam_steps`` steps."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Parts:
    """What an engine is built of. ``make_model`` gives a model without weights, with ``blocks`` and
    ``ends`` to be split one by one, and ``tie``; parameters that want no gradient are frozen.
    ``trained``: how many are not; ``batch_size`` and ``grad_accum``: sequences of a micro-step, and
    micro-steps."""

    make_model: Callable[[], nn.Module]
    trained: int
    optimizer: Optimizer
    context: Context
    precision: str
    batch_size: int
    grad_accum: int
