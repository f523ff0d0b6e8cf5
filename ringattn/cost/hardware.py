"""What a machine can do: rates, bandwidths, latencies, memory. Presets are in configs/machines;
``ringattn calibrate`` measures the machine at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

_RENAMED = {"inside": "intra_node", "between": "inter_node", "hidden": "overlap_efficiency",
            "crowd": "oversubscription"}  # fmt: skip


class HardwareError(ValueError):
    """One line that names the key of a hardware description, what it holds and what is legal."""


@dataclass(frozen=True)
class Curve:
    """A quantity by size: linear in the logarithm of the size between its points, constant beyond
    them."""

    points: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, value: float | Mapping[Any, float]) -> Curve:
        pairs = value.items() if isinstance(value, Mapping) else [(1, value)]
        return cls(tuple(sorted((float(x), float(y)) for x, y in pairs)))

    def __call__(self, size: Any) -> Any:
        """At ``size``, a number or an array of them; sizes below 1 count as 1."""
        x, y = np.array(self.points).T
        return np.interp(np.log2(np.maximum(size, 1)), np.log2(x), y)


@dataclass(frozen=True)
class KernelSpeed:
    """One pass of the attention kernel.

    Attributes:
        efficiency: share of the peak on a full block, by the tokens of its side.
        edge: what a row costs more where a diagonal cuts the block, in pairs, by the rows that it
            cuts.
        band: the same at each side of a window, by its width; None: as ``edge``.
        softmax: what a pair costs beyond its products, as if the head_dim of k and v together were
            so much larger; ``efficiency`` counts it in.
    """

    efficiency: Curve = Curve(((1.0, 0.45),))
    edge: Curve = Curve(((1.0, 64.0),))
    band: Curve | None = None
    softmax: float = 0.0


@dataclass(frozen=True)
class Link:
    """How one rank exchanges: bytes/s received while it sends as many, by the bytes of the
    exchange; seconds of an exchange however small, and of every message in it; bytes/s from one
    peer, where those of all need several (a peer has two messages, of K and of V); bytes/s of all
    ranks of a node together, where several share the link; and the machine's ``collective`` and
    ``overlap_efficiency``, where this link has its own."""

    bandwidth: Curve
    latency: float = 0.0
    message: float = 0.0
    peer: float = float("inf")
    node: float = float("inf")
    collective: float | None = None
    overlap_efficiency: float | None = None

    def seconds(self, size: Any, messages: Any, together: int = 1) -> Any:
        """Of one exchange, or of arrays of them; one without messages takes no time. ``together``:
        so many ranks of a node exchange as much at once."""
        messages = np.asarray(messages)
        rate = np.minimum(self.bandwidth(size), self.peer * np.maximum(messages / 2, 1))
        alone = self.latency + messages * self.message + size / rate
        shared = self.shared(size * together) if together > 1 else 0.0
        return np.where(messages > 0, np.maximum(alone, shared), 0.0)

    def shared(self, size: Any) -> Any:
        """Of an exchange in which the ranks of a node receive so many bytes in all."""
        return self.latency + size / self.node


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A machine. Descriptions of some are in configs/machines: see :mod:`ringattn.cost.presets`.

    Attributes:
        source: where the numbers come from.
        node_size: ranks of a node.
        cores: how many ranks of a node compute at a time; None where each has a device of its own.
        oversubscription, switch: where there are more ranks than cores, the share that kernels
            take longer beyond their turns, and the seconds that an exchange waits for a core.
        peak: FLOP/s of a rank by precision, which MFU divides by.
        forward, backward: the attention kernel.
        matmul: share of the peak that the model's matrix products reach, by tokens of a rank.
        memory, memory_bandwidth: of a rank's device, bytes and bytes/s.
        intra_node, inter_node: links in a node, and of one rank to other nodes; None where no other
            node has been seen: ranks that share cores are then all taken to be on this one.
        collective: bytes/s of engines' collectives over those of ``intra_node`` and ``inter_node``.
        host, host_memory: a rank's link to host memory and its share of that, bytes.
        overlap_efficiency: share of an exchange's time that a kernel under way does not feel.
        dispatch: seconds per operator that the device waits for.
        step: seconds of an optimizer step, however small.
        framework: bytes that a rank holds before there is a model.
        resident: bytes held for each that is allocated, where the host's allocator is concerned.
    """

    name: str
    source: str
    node_size: int
    peak: tuple[tuple[str, float], ...]
    forward: KernelSpeed
    backward: KernelSpeed
    matmul: Curve
    memory: float
    memory_bandwidth: float
    intra_node: Link
    inter_node: Link | None
    host: Link
    host_memory: float
    collective: float = 1.0
    overlap_efficiency: float = 1.0
    dispatch: float = 0.0
    step: float = 0.0
    framework: float = 0.0
    resident: float = 1.0
    cores: int | None = None
    oversubscription: float = 0.0
    switch: float = 0.0

    def flops(self, precision: str) -> float:
        """Peak FLOP/s of a rank. Raises HardwareError where the precision has none."""
        rates = dict(self.peak)
        if precision not in rates:
            raise HardwareError(
                f"peak.{precision}: {self.name} has figures for {', '.join(rates)} only"
            )
        return rates[precision]

    @property
    def alone(self) -> bool:
        """Whether all ranks are taken to be on one node, and to share its cores."""
        return self.inter_node is None and self.cores is not None

    def covers(self, world: int) -> bool:
        """Whether so many ranks are on nodes that it knows of."""
        return self.inter_node is not None or self.alone or world <= self.node_size

    def node(self, world: int) -> int:
        """Ranks of a node, in a world of so many. Raises HardwareError where there must be other
        nodes, and nothing is known of them."""
        if self.alone:
            return world
        if world > self.node_size:
            self.link(True)
        return min(self.node_size, world)

    def sharing(self, world: int) -> int:
        """Ranks that share a node's cores and memory: 1 where each has its own."""
        return 1 if self.cores is None else self.node(world)

    def link(self, crosses: bool) -> Link:
        """What an exchange goes over that crosses between nodes, or does not, with its own share of
        overlap and of collectives. Raises HardwareError as :meth:`node` does."""
        link = self.inter_node if crosses and not self.alone else self.intra_node
        if link is None:
            raise HardwareError(
                f"inter_node: {self.name} is described as one machine of {self.node_size} ranks; "
                "calibrate on several (torchrun --nnodes 2 ... -m ringattn calibrate), or write "
                "inter_node into the description"
            )
        mine = {
            name: getattr(self, name)
            for name in ("collective", "overlap_efficiency")
            if getattr(link, name) is None
        }
        return replace(link, **mine)

    @classmethod
    def read(cls, description: Mapping[str, Any]) -> Hardware:
        """From the plain mapping of a YAML file. Raises HardwareError."""
        unknown = set(description) - {f.name for f in fields(cls)}
        if unknown:
            now = _RENAMED.get(min(unknown))
            raise HardwareError(
                f"unknown key {min(unknown)!r}; "
                + (f"it is {now} now" if now else "this is no hardware description")
            )
        missing = {f.name for f in fields(cls)} - {
            *description,
            "cores",
            "oversubscription",
            "switch",
            "resident",
        }
        if missing:
            raise HardwareError(f"{min(missing)} is missing")
        values = {name: _value(name, value) for name, value in description.items()}
        if values["inter_node"] == values["intra_node"]:
            values["inter_node"] = None  # how a calibration of one machine was written once
        return cls(**values)


def _value(name: str, value: Any) -> Any:
    if name in ("name", "source"):
        return str(value)
    if name in ("forward", "backward"):
        parts = dict(_map(name, value))
        if set(parts) - {"efficiency", "edge", "band", "softmax"} or "efficiency" not in parts:
            raise HardwareError(
                f"{name} has efficiency, edge, band and softmax; got {', '.join(parts)}"
            )
        softmax = _number(f"{name}.softmax", parts.pop("softmax", 0.0))
        return KernelSpeed(**{key: _curve(f"{name}.{key}", x) for key, x in parts.items()},
                      softmax=softmax)  # fmt: skip
    if name == "inter_node" and value is None:
        return None
    if name in ("intra_node", "inter_node", "host"):
        parts = dict(_map(name, value))
        curve = _curve(f"{name}.bandwidth", parts.pop("bandwidth", None))
        numbers = {key: _number(f"{name}.{key}", x) for key, x in parts.items()}
        legal = [field.name for field in fields(Link)]
        if set(numbers) - set(legal):
            raise HardwareError(f"{name} has {', '.join(legal)}; got {', '.join(parts)}")
        return Link(curve, **numbers)
    if name == "matmul":
        return _curve(name, value)
    if name == "peak":
        return tuple((str(k), _number(f"peak.{k}", x)) for k, x in _map(name, value).items())
    if name in ("node_size", "cores"):
        return None if value is None else int(_number(name, value))
    return _number(name, value)


def _map(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise HardwareError(f"{name} must be a mapping; got {value!r}")
    return value


def _curve(name: str, value: Any) -> Curve:
    numbers = value.items() if isinstance(value, Mapping) else [("1", value)]
    curve = {_number(f"{name}.{x}", x): _number(f"{name}.{x}", y) for x, y in numbers}
    if not curve:
        raise HardwareError(f"{name} must be a number, or numbers by size; got {value!r}")
    return Curve.of(curve)


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number < float("inf"):
        raise HardwareError(f"{name} must be a number of at least 0; got {value!r}")
    return number
