"""From tensors to launches of the Gluon kernels: work lists, descriptors and arguments."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from ringattn.kernels import Scores
from ringattn.kernels.call import Call, Tables, derived, in_base_2, order, side_by_side
from ringattn.kernels.gluon import bwd, fwd
from ringattn.kernels.launch import Launch
from ringattn.kernels.work import Chain, Work, chain, work
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ringattn.planning.slices import Band

# What a head_dim is held as along a contraction: (width of a chunk, chunks). Along the other side
# of a product it is a power of two. The copy engine fills up with zeros.
CHUNKS = {64: (64, 1), 96: (32, 3), 128: (128, 1), 192: (64, 3), 256: (256, 1)}
WARPGROUPS = 2  # that share a tile of queries in the forward
# K/V heads whose tiles of keys run side by side in the backward, at least. Tiles of one head add
# to the same queries one after the other: where many start at once, the last ones wait long.
HEADS_TOGETHER = 16
_REGISTERS = 168  # of a thread when a kernel starts; its partitions then deal them out anew
_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


def forward(
    line: Launch,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bands: Sequence[Band],
    partial: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scores: Scores,
) -> Call:
    """One launch over all bands, on as many programs as there are multiprocessors. ``partial`` has
    the strides of ``out``."""
    batch, rows, heads, _ = q.shape
    listed = _listed(bands, rows, line, q.device)
    # The rows of tiles without work.
    blank = () if listed.everything or partial is out else ((out, partial),)
    width, count = CHUNKS[_chunk_of(q.shape[3])]
    arguments = {
        "q_desc": _tiles(q, line.m // WARPGROUPS, width),
        "k_desc": _tiles(k, line.n, width),
        "v_desc": _tiles(v, line.n, _power_chunk_of(v.shape[3])),
        "partial": out if partial is None else partial,
        "out": out,
        "lse": lse,
        "tiles": listed.tiles,
        "visits": listed.visits,
        "counters": q.new_empty(0, dtype=torch.int32),
        "strides": out.stride()[:3],
        "rows": rows,
        "heads": heads,
        "group": heads // k.shape[2],
        "batch_heads": batch * heads,
        "together": side_by_side((k, v), batch, heads),
        "tile_count": len(listed.tiles),
        "DV": v.shape[3],
        "CHUNKS": count,
        "STAGES": line.stages,
        "ADD": partial is not None,
        **in_base_2(scores),
    }
    grid = min(len(listed.tiles) * batch * heads, _multiprocessors(q.device))
    options = _options(line)
    return Call(fwd.forward, grid, arguments, options, q.device, listed.tables, 1, blank)


def backward(
    line: Launch,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse2: torch.Tensor,
    delta: torch.Tensor,
    bands: Sequence[Band],
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    scores: Scores,
    add_q: bool,
    add_k: bool,
) -> Call:
    """dq without sm_scale, dk and dv; with ``add_q`` and ``add_k`` on top of what they hold."""
    (batch, queries, heads, dim), (_, rows, kv_heads, v_dim) = q.shape, v.shape
    listed = _chained(bands, rows, queries, line, q.device)
    blank = () if add_q else ((dq, None),)
    if not add_k and not listed.everything:  # the rows of tiles without work
        blank += (dk, None), (dv, None)
    size, v_size, blocks = _power_chunk_of(dim), _power_chunk_of(v_dim), -(-queries // line.m)
    arguments = {
        "q_desc": _tiles(q, line.m, size),
        "do_desc": _tiles(dout, line.m, v_size),
        "k_desc": _tiles(k, line.n, size),
        "v_desc": _tiles(v, line.n, v_size),
        "lse_desc": _rows(lse2, line.m),
        "delta_desc": _rows(delta, line.m),
        "dq_desc": _tiles(dq, line.m, size),
        "dk": dk,
        "dv": dv,
        "counters": q.new_empty(0, dtype=torch.int32),
        "tiles": listed.tiles,
        "visits": listed.visits,
        "turns": listed.turns,
        "dk_strides": dk.stride()[:3],
        "dv_strides": dv.stride()[:3],
        "rows": rows,
        "heads": kv_heads,
        "group": heads // kv_heads,
        "batch_heads": batch * kv_heads,
        "together": side_by_side((q, dout, dq), batch, kv_heads, HEADS_TOGETHER),
        "tile_count": len(listed.tiles),
        "blocks": blocks,
        "sm_scale": scores.sm_scale,
        "D": dim,
        "DV": v_dim,
        "STAGES": line.stages,
        "WRITERS": line.writers,
        "ADD": add_k,
        **in_base_2(scores),
    }
    grid = len(listed.tiles) * batch * kv_heads
    counters = bwd.TICKET.value + batch * heads * blocks
    options = _options(line)
    return Call(bwd.backward, grid, arguments, options, q.device, listed.tables, counters, blank)


def _chunk_of(size: int) -> int:
    """The smallest size in CHUNKS that holds a head_dim."""
    return min(chunk for chunk in CHUNKS if chunk >= size)


def _power_chunk_of(size: int) -> int:
    """The smallest power of two in CHUNKS that holds a head_dim."""
    return min(chunk for chunk in CHUNKS if chunk >= size and chunk & (chunk - 1) == 0)


def _options(line: Launch) -> dict[str, Any]:
    return {"num_warps": line.warps, "maxnreg": _REGISTERS, "enable_fp_fusion": True}


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132  # of an H100, for the compiler and for the emulator
    return torch.cuda.get_device_properties(device).multi_processor_count


class _Listed:
    """A work list on the device, of tiles with work only; ``turns`` are those of a chain, and empty
    for other work. ``everything``: every row is in one of the tiles."""

    def __init__(self, listed: Work | Chain, rows: int, m: int, device: torch.device) -> None:
        turns = listed.turns if isinstance(listed, Chain) else listed.visits[:0, :2]
        self.tables = Tables((listed.tiles, listed.visits, turns), device)
        self.tiles, self.visits, self.turns = self.tables.parts
        self.everything = len(listed.tiles) == -(-rows // m)


def _listed(bands: Sequence[Band], rows: int, line: Launch, device: torch.device) -> _Listed:
    def make() -> _Listed:
        listed = work(bands, rows, line.m, line.n, False, False)
        return _Listed(listed, rows, line.m, device)

    return derived(bands, ("work", rows, line.m, line.n, False, False, device), make)


def _chained(
    bands: Sequence[Band], rows: int, queries: int, line: Launch, device: torch.device
) -> _Listed:
    """Tiles of keys, and the order in which they add to tiles of queries."""

    def make() -> _Listed:
        listed = work(bands, rows, line.n, line.m, True, False, aligned=True)
        return _Listed(chain(listed, queries, line.m), rows, line.n, device)

    return derived(bands, ("chain", rows, queries, line.m, line.n, device), make)


def _tiles(x: torch.Tensor, tokens: int, size: int) -> TensorDescriptor:
    """Tiles of ``tokens`` of one head of x ``[batch, tokens, heads, head_dim]``."""
    return _descriptor(x, x.shape, order(x), (1, tokens, 1, size))


def _rows(x: torch.Tensor, tokens: int) -> TensorDescriptor:
    """Tiles of ``tokens`` of one row of x ``[batch, heads, tokens]``, dense but for its pitch."""
    rows = (x.shape[0] * x.shape[1], x.shape[2])
    return _descriptor(x, rows, [x.stride(1), 1], (1, tokens))


def _descriptor(
    x: torch.Tensor, shape: Sequence[int], strides: list[int], block: tuple[int, ...]
) -> TensorDescriptor:
    return TensorDescriptor(x, list(shape), strides, list(block), _layout(x.dtype, block))


@cache
def _layout(dtype: torch.dtype, block: tuple[int, ...]) -> Any:
    return gl.NVMMASharedLayout.get_default_for(list(block), _TYPES[dtype])
