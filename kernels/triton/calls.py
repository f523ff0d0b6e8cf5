"""From tensors to launches of the Triton kernels: which line of the table, which work list, which
arguments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from ringattn.kernels import Scores, call
from ringattn.kernels.call import Call, Tables, derived, in_base_2, order, stepped
from ringattn.kernels.launch import Launch, launch
from ringattn.kernels.triton import bwd, fwd
from ringattn.kernels.work import Work, work
from triton.tools.tensor_descriptor import TensorDescriptor

from ringattn.planning.slices import Band

_PREPARE_ELEMENTS = 4096  # of a program of prepare, so that nothing spills


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
    scores: Scores,
    line: Launch | None = None,
) -> Call:
    """One launch over all bands; ``line``: another one than the table's."""
    line = line or _line("forward", arch, q, v, (k, v), bands, scores)
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
        **in_base_2(scores),
    )


def prepare(
    dout: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    lse2: torch.Tensor,
    delta: torch.Tensor,
) -> Call:
    """lse2 and delta ``[batch, heads, tokens]`` of all queries, rows of one pitch; see the
    kernel."""
    batch, tokens, heads, dim = out.shape
    size = max(16, 1 << (dim - 1).bit_length())
    rows = max(16, min(32, _PREPARE_ELEMENTS // size))
    arguments = {
        "dout": dout,
        "out": out,
        "lse": lse,
        "lse2": lse2,
        "delta": delta,
        "dout_strides": dout.stride()[:3],
        "out_strides": out.stride()[:3],
        "tokens": tokens,
        "pitch": lse2.stride(1),
        "heads": heads,
        "D": dim,
        "SIZE": size,
        "M": rows,
    }
    grid = batch * heads * -(-tokens // rows)
    return Call(
        bwd.prepare, grid, arguments, {"num_warps": 4, "enable_fp_fusion": True}, out.device
    )


def backward(
    arch: str,
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
) -> Iterator[Call]:
    """Both passes, which share nothing but their inputs."""
    inputs = (arch, dout, q, k, v, lse2, delta, bands)
    yield backward_keys(*inputs, dk, dv, scores, add_k)
    yield backward_queries(*inputs, dq, scores, add_q)


def backward_keys(
    arch: str,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse2: torch.Tensor,
    delta: torch.Tensor,
    bands: Sequence[Band],
    dk: torch.Tensor,
    dv: torch.Tensor,
    scores: Scores,
    add: bool,
    line: Launch | None = None,
) -> Call:
    """dk and dv; with ``add`` on top of what they hold."""
    line = line or _line("backward_keys", arch, q, v, (q, dout), bands, scores)
    return _call(
        bwd.backward_keys,
        line,
        _listed(bands, k.shape[1], line, True, not add, k.device),
        rows=k,
        sizes=(q.shape[3], v.shape[3]),
        strided={"q": q, "k": k, "v": v, "dout": dout, "dk": dk, "dv": dv},
        columns=("q", "dout"),
        lse2=lse2,
        delta=delta,
        pitch=lse2.stride(1),
        group=q.shape[2] // k.shape[2],
        sm_scale=scores.sm_scale,
        ADD=add,
        **in_base_2(scores),
    )


def backward_queries(
    arch: str,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse2: torch.Tensor,
    delta: torch.Tensor,
    bands: Sequence[Band],
    dq: torch.Tensor,
    scores: Scores,
    add: bool,
    line: Launch | None = None,
) -> Call:
    """dq without sm_scale; with ``add`` on top of what it holds."""
    line = line or _line("backward_queries", arch, q, v, (k, v), bands, scores)
    return _call(
        bwd.backward_queries,
        line,
        _listed(bands, q.shape[1], line, False, not add, q.device),
        rows=q,
        sizes=(q.shape[3], v.shape[3]),
        strided={"q": q, "k": k, "v": v, "dout": dout, "dq": dq},
        columns=("k", "v"),
        lse2=lse2,
        delta=delta,
        pitch=lse2.stride(1),
        group=q.shape[2] // k.shape[2],
        ADD=add,
        **in_base_2(scores),
    )


def _line(
    name: str,
    arch: str,
    q: torch.Tensor,
    v: torch.Tensor,
    columns: Sequence[torch.Tensor],
    bands: Sequence[Band],
    scores: Scores,
) -> Launch:
    """Descriptors read dense runs of aligned tensors; all else goes through pointers."""
    dense = not stepped(bands) and all(call.aligned(x) for x in columns)
    return launch(arch, name, q.element_size(), q.shape[3], v.shape[3], dense, scores.softcap > 0)


class _Listed:
    """A work list on the device."""

    def __init__(self, listed: Work, device: torch.device) -> None:
        self.tables = Tables((listed.tiles, listed.visits), device)
        self.tiles, self.visits = self.tables.parts
        self.row_step, self.stepped = listed.row_step, listed.stepped


def _listed(
    bands: Sequence[Band],
    rows: int,
    line: Launch,
    transposed: bool,
    everything: bool,
    device: torch.device,
) -> _Listed:
    def make() -> _Listed:
        return _Listed(work(bands, rows, line.m, line.n, transposed, everything), device)

    key = ("work", rows, line.m, line.n, transposed, everything, device)
    return derived(bands, key, make)


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
    together = call.side_by_side([strided[name] for name in columns], batch, heads)
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
    grid = len(listed.tiles) * batch * heads
    return Call(kernel, grid, arguments, options, rows.device, listed.tables)


def _descriptor(x: torch.Tensor, tokens: int, size: int) -> TensorDescriptor:
    """Tiles of ``tokens`` of one head of x."""
    by_head = x.transpose(1, 2)
    return TensorDescriptor(x, list(by_head.shape), order(by_head), [1, 1, tokens, size])
