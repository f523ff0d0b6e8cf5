"""From tensors to launches: which line of the table, which work list, which arguments.

A :class:`Call` is a kernel with its grid, its arguments and its compiler options. ``run`` launches
it; ``ringattn kernels`` builds the same calls on tensors without memory and only compiles them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from ringattn.kernels.triton import bwd, fwd
from ringattn.kernels.triton.launch import Launch, launch
from ringattn.kernels.triton.work import work
from triton.tools.tensor_descriptor import TensorDescriptor

from ringattn.slices import Band

LOG2E = 1 / math.log(2)
# K/V (or Q/dO) of heads that run side by side should stay in the L2 cache: 50 MB on an H100.
_L2_BYTES = 32 * 2**20
_PREPARE_ROWS = 32
# Ranks may be threads. Triton's interpreter exchanges the functions of triton.language while it
# runs, and a compiled kernel is not ready for a second thread while the first one loads it.
_ONE_AT_A_TIME = Lock()


@dataclass(frozen=True)
class Call:
    """``options``: num_warps and the like. ``grid``: programs."""

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    options: dict[str, Any]
    device: torch.device

    def run(self) -> None:
        if not self.grid:
            return
        # Triton launches on the current device, which need not be that of the tensors.
        on = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with _ONE_AT_A_TIME, on:
            self.kernel[(self.grid,)](**self.arguments, **self.options)


def halves(size: int) -> tuple[int, int]:
    """A head_dim as one or two powers of two that hold it: 96 as (64, 32), 80 as (64, 16)."""
    whole = 1 << (size - 1).bit_length()
    first = whole // 2
    second = max(16, 1 << (size - first - 1).bit_length()) if size > first else 0
    return (first, second) if first >= 16 and first + second < whole else (max(16, whole), 0)


def forward(
    arch: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bands: Sequence[Band],
    partial: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    softcap: float,
    line: Launch | None = None,
) -> Call:
    """One launch over all bands; ``line``: another one than the table's."""
    line = line or _line("forward", arch, q, v, (k, v), bands, softcap)
    before = out if partial is None else partial
    return _call(
        fwd.forward,
        line,
        # A new tensor wants all of its rows, one that is added to only those with work.
        _listed(bands, q.shape[1], line, False, partial is not out, q.device),
        rows=q,
        sizes=(q.shape[3], v.shape[3]),
        strided={"q": q, "k": k, "v": v, "partial": before, "out": out},
        columns=("k", "v"),
        lse=lse,
        group=q.shape[2] // k.shape[2],
        OVERLAP=line.overlap,
        ADD=partial is not None,
        **_scales(scale, softcap),
    )


def prepare(
    dout: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    levels: torch.Tensor,
    drops: torch.Tensor,
) -> Call:
    """Levels and drops ``[batch, heads, tokens]`` of all queries; see the kernel."""
    batch, tokens, heads, dim = out.shape
    arguments = {
        "dout": dout,
        "out": out,
        "lse": lse,
        "levels": levels,
        "drops": drops,
        "dout_strides": dout.stride()[:3],
        "out_strides": out.stride()[:3],
        "tokens": tokens,
        "heads": heads,
        "D": dim,
        "SIZE": max(16, 1 << (dim - 1).bit_length()),
        "M": _PREPARE_ROWS,
    }
    grid = batch * heads * -(-tokens // _PREPARE_ROWS)
    return Call(
        bwd.prepare, grid, arguments, {"num_warps": 4, "enable_fp_fusion": True}, out.device
    )


def backward_keys(
    arch: str,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    levels: torch.Tensor,
    drops: torch.Tensor,
    bands: Sequence[Band],
    dk: torch.Tensor,
    dv: torch.Tensor,
    scale: float,
    softcap: float,
    add: bool,
    line: Launch | None = None,
) -> Call:
    """dk and dv; with ``add`` on top of what they hold."""
    line = line or _line("backward_keys", arch, q, v, (q, dout), bands, softcap)
    return _call(
        bwd.backward_keys,
        line,
        _listed(bands, k.shape[1], line, True, not add, k.device),
        rows=k,
        sizes=(q.shape[3], v.shape[3]),
        strided={"q": q, "k": k, "v": v, "dout": dout, "dk": dk, "dv": dv},
        columns=("q", "dout"),
        levels=levels,
        drops=drops,
        queries=q.shape[1],
        group=q.shape[2] // k.shape[2],
        natural=scale,
        ADD=add,
        **_scales(scale, softcap),
    )


def backward_queries(
    arch: str,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    levels: torch.Tensor,
    drops: torch.Tensor,
    bands: Sequence[Band],
    dq: torch.Tensor,
    scale: float,
    softcap: float,
    add: bool,
    line: Launch | None = None,
) -> Call:
    """dq; with ``add`` on top of what it holds."""
    line = line or _line("backward_queries", arch, q, v, (k, v), bands, softcap)
    return _call(
        bwd.backward_queries,
        line,
        _listed(bands, q.shape[1], line, False, not add, q.device),
        rows=q,
        sizes=(q.shape[3], v.shape[3]),
        strided={"q": q, "k": k, "v": v, "dout": dout, "dq": dq},
        columns=("k", "v"),
        levels=levels,
        drops=drops,
        group=q.shape[2] // k.shape[2],
        natural=scale,
        ADD=add,
        **_scales(scale, softcap),
    )


def _line(
    name: str,
    arch: str,
    q: torch.Tensor,
    v: torch.Tensor,
    columns: Sequence[torch.Tensor],
    bands: Sequence[Band],
    softcap: float,
) -> Launch:
    """Descriptors read dense runs of aligned tensors; all else goes through pointers."""
    dense = not _stepped(bands) and all(_aligned(x) for x in columns)
    return launch(arch, name, q.element_size(), q.shape[3], v.shape[3], dense, softcap > 0)


def _aligned(x: torch.Tensor) -> bool:
    """Whether the copy engine can read x: 16 byte steps, none of them 0."""
    steps = [x.stride(axis) * x.element_size() for axis in range(3) if x.shape[axis] > 1]
    return x.data_ptr() % 16 == 0 and all(s > 0 and s % 16 == 0 for s in steps)


def _stepped(bands: Sequence[Band]) -> bool:
    return _derived(bands, "stepped", lambda: any(b.q.step > 1 or b.k.step > 1 for b in bands))


def _derived(bands: Sequence[Band], key: Any, make: Callable[[], Any]) -> Any:
    """What belongs to these bands, kept with the plan that they are of."""
    kept = getattr(bands, "derived", {})
    if key not in kept:
        kept[key] = make()
    return kept[key]


@dataclass(frozen=True)
class _Listed:
    """A work list on the device."""

    tiles: torch.Tensor
    visits: torch.Tensor
    row_step: int
    stepped: bool


def _listed(
    bands: Sequence[Band],
    rows: int,
    line: Launch,
    transposed: bool,
    everything: bool,
    device: torch.device,
) -> _Listed:
    def make() -> _Listed:
        made = work(bands, rows, line.m, line.n, transposed, everything)
        tiles, visits = (torch.from_numpy(x).to(device) for x in (made.tiles, made.visits))
        return _Listed(tiles, visits, made.row_step, made.stepped)

    key = ("work", rows, line.m, line.n, transposed, everything, device)
    return _derived(bands, key, make)


def _scales(scale: float, softcap: float) -> dict[str, Any]:
    """As the kernels want them: scores in base 2, or in multiples of the cap."""
    if softcap:
        return {"scale": scale / softcap, "cap": softcap * LOG2E, "CAPPED": True}
    return {"scale": scale * LOG2E, "cap": 1.0, "CAPPED": False}


def _call(
    kernel: Any,
    line: Launch,
    listed: _Listed,
    rows: torch.Tensor,
    sizes: tuple[int, int],
    strided: dict[str, torch.Tensor],
    columns: tuple[str, str],
    **arguments: Any,
) -> Call:
    """``strided``: tensors that go with their strides; ``columns``: those of them whose tiles
    stream, one of q's head_dim and one of v's."""
    batch, tokens, heads, _ = rows.shape
    (d1, d2), (dv1, dv2) = (halves(size) for size in sizes)
    arguments |= strided
    arguments |= {f"{name}_strides": x.stride()[:3] for name, x in strided.items()}
    for name, first, second in zip(columns, (d1, dv1), (d2, dv2), strict=True):
        x = strided[name]
        arguments[name] = _descriptor(x, line.n, first) if line.tma else x
        arguments[f"{name}2"] = _descriptor(x, line.n, second or first) if line.tma else x
    # Bytes that stream for one K/V head, and how many of these, with all their programs, fit.
    streams = [strided[name] for name in columns]
    kv_heads = min(heads, streams[0].shape[2])
    size = sum(x.shape[1:].numel() * x.element_size() for x in streams) // kv_heads
    together = max(1, _L2_BYTES // max(1, size)) * (heads // kv_heads)
    together = min(together, batch * heads)  # beyond that it would only overflow
    arguments |= {
        "tiles": listed.tiles,
        "visits": listed.visits,
        "rows": tokens,
        "row_step": listed.row_step,
        "heads": heads,
        "batch_heads": batch * heads,
        "together": together,
        "tile_count": len(listed.tiles),
        "D": sizes[0],
        "D1": d1,
        "D2": d2,
        "DV": sizes[1],
        "DV1": dv1,
        "DV2": dv2,
        "M": line.m,
        "N": line.n,
        "TMA": line.tma,
        "WS": line.specialize,
        "STEPPED": listed.stepped,
        "PRECISION": line.precision,
    }
    options = {"num_warps": line.warps, "num_stages": line.stages, "enable_fp_fusion": True}
    return Call(kernel, len(listed.tiles) * batch * heads, arguments, options, rows.device)


def _descriptor(x: torch.Tensor, tokens: int, size: int) -> TensorDescriptor:
    """Tiles of ``tokens`` of one head of x. An axis of length 1 may have any stride: it gets one
    that the copy engine takes."""
    order = (0, 2, 1, 3)
    shape = [x.shape[axis] for axis in order]
    strides = [x.stride(axis) if x.shape[axis] > 1 else 128 for axis in order[:3]] + [1]
    return TensorDescriptor(x, shape, strides, [1, 1, tokens, size])
