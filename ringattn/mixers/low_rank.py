"""Attention through few summaries of a whole document: projections over its length, a packed
memory, landmarks; and sparse attention beside a low-rank rest. All but :func:`scatterbrain` look
into the future.

``kernel`` and ``scale`` are those of :func:`ringattn.ring_attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from einops import rearrange

from ringattn.execution.carriers import Comm, connect
from ringattn.kernels import state_dtype
from ringattn.mixers.chunks import in_float32
from ringattn.mixers.heads import split_heads
from ringattn.mixers.pooling import gather, pool
from ringattn.mixers.recurrent import linear
from ringattn.mixers.union import Part, State, combine, union
from ringattn.planning.blocks import Blocks, layout_of
from ringattn.planning.segments import Segments

_DIGITS = 1e-5  # of a float32 sum, below which a difference is rounding
_LEAST = 1e-30  # of what can be divided by


@in_float32
def linformer(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    project_k: torch.Tensor,
    project_v: torch.Tensor,
    *,
    blocks: Blocks,
    group: Any = None,
    kernel: str = "auto",
    scale: float | None = None,
) -> torch.Tensor:
    """Attention over keys and values that are projected along the length, ``k' = project_k^T k``
    (Wang et al. 2020, arXiv:2006.04768). Not causal.

    q ``[batch, local tokens, heads, head_dim]``, k and v with kv_heads; project_k and project_v
    ``[longest document, slots]``, by the position in the document, alike on all ranks; their
    gradient is this rank's share. Of ``blocks`` only the documents matter. Returns what q is like.
    Collective over ``group``. Raises ValueError for projections that are too short.
    """
    longest, slots = project_k.shape
    if longest < max(blocks.lengths) or project_v.shape != project_k.shape:
        raise ValueError(
            f"linformer: projections must be [{max(blocks.lengths)} or more, slots] and alike, got "
            f"{list(project_k.shape)} and {list(project_v.shape)}"
        )
    documents, comm = _documents(blocks), connect(group)
    own = blocks.layout.positions(comm.rank)
    at = torch.from_numpy(own - blocks.begins[_document(blocks, own)]).to(q.device)
    shape = (*k.shape[:3], slots)
    k, v = (
        pool(x, documents, comm, "sum", project[at][None, :, None].expand(shape)).to(q.dtype)
        for x, project in ((k, project_k), (v, project_v))
    )
    return _over_memory(q, k, v, documents, slots, comm, kernel, scale)


@in_float32
def luna(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    memory: torch.Tensor,
    *,
    blocks: Blocks,
    project: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
    group: Any = None,
    kernel: str = "auto",
    scale: float | None = None,
) -> torch.Tensor:
    """A packed memory (Ma et al. 2021, "Luna", arXiv:2106.01540): ``memory`` ``[kv_heads, slots,
    head_dim]`` attends all tokens of a document, and every token attends what it has become. Not
    causal.

    ``project``: makes keys and values of the packed memory ``[batch, own rows, kv_heads, v_dim]``;
    None: both are it. ``memory`` is alike on all ranks; its gradient is this rank's share. All else
    as in :func:`linformer`.
    """
    documents, comm = _documents(blocks), connect(group)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bthd,hmd->bthm", k.float() if k.itemsize < 4 else k, memory.to(
        state_dtype(k.dtype))) * factor  # fmt: skip
    packed = pool(v, documents, comm, "softmax", logits).to(q.dtype)
    k, v = (packed, packed) if project is None else project(packed)
    return _over_memory(q, k, v, documents, memory.shape[1], comm, kernel, scale)


@in_float32
def nystrom(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    blocks: Blocks,
    group: Any = None,
    steps: int = 6,
    kernel: str = "auto",
    scale: float | None = None,
) -> torch.Tensor:
    """Attention through landmarks, the means of ``blocks`` of queries and of keys (Xiong et al.
    2021, "Nystromformer", arXiv:2102.03902): ``softmax(q k'^T) pinv(softmax(q' k'^T)) softmax(q'
    k^T) v``, each document by itself, with the paper's iteration of so many ``steps`` for the
    inverse. Not causal.

    q ``[batch, local tokens, heads, head_dim]``, k and v with kv_heads. Returns what q is like.
    Collective over ``group``.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale

    def mixer(
        blocks: Blocks, comm: Comm, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        dtype, wide = state_dtype(q.dtype), q.shape[2] // k.shape[2]
        documents = _documents(blocks)
        k_all, v_all = (x.repeat_interleave(wide, 2).to(dtype) for x in (k, v))
        own = blocks.summaries()
        q_mean = gather(pool(q, blocks, comm), own, comm)  # [batch, landmarks, heads, dim]
        k_mean = gather(pool(k_all, blocks, comm), own, comm)
        # The landmarks of a token's document are its slots.
        counts = blocks.lasts - blocks.firsts
        slots = int(counts.max(initial=1))
        at = blocks.layout.positions(comm.rank)
        numbers = blocks.firsts[_document(blocks, at)][:, None] + np.arange(slots)
        numbers = np.minimum(numbers, max(0, len(blocks) - 1))
        index = torch.from_numpy(numbers).to(q.device)
        logits = torch.einsum("bthd,blhd->bthl", k_all, q_mean) * factor
        logits = logits.take_along_dim(index[None, :, None], 3)
        packed = pool(v_all, documents, comm, "softmax", logits)
        packed = rearrange(packed, "b (n m) h d -> b n h m d", m=slots)
        keys, values = [], []
        mine = np.flatnonzero(documents.owner == comm.rank).tolist()
        for number, document in enumerate(documents.document[mine].tolist()):
            some = slice(int(blocks.firsts[document]), int(blocks.lasts[document]))
            a = torch.einsum("blhd,bchd->bhlc", q_mean[:, some], k_mean[:, some]) * factor
            inverse = pseudo_inverse(a.softmax(-1), steps)
            value = inverse @ packed[:, number, :, : a.shape[-1]]
            keys.append(k_mean[:, some])
            values.append(value.transpose(1, 2))
        if not keys:  # what others do with its shares has a gradient here
            keys, values = [k_mean[:, :0]], [v_all[:, :0]]
        own_keys, own_values = (torch.cat(x, 1).to(q.dtype) for x in (keys, values))
        layout = blocks.remember("landmarks", lambda: _of_documents(blocks, documents))
        part = Part(own_keys, own_values, blocks.plan(blocks.whole(), layout))
        out = union(q, [part], comm, kernel, scale)
        # Connected on every rank: the exchanges of the backward are everybody's.
        return out + 0 * (q_mean.sum() + k_mean.sum() + packed.sum()).to(out.dtype)

    return split_heads(mixer, blocks, connect(group), q, k, v)


@in_float32
def scatterbrain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_features: torch.Tensor,
    k_features: torch.Tensor,
    *,
    blocks: Blocks,
    group: Any = None,
    kernel: str = "auto",
    scale: float | None = None,
) -> torch.Tensor:
    """Sparse and low-rank attention under one normaliser (Chen et al. 2021, arXiv:2110.15343):
    ``exp`` of the scores within the token's block (of ``blocks``), the product of the features with
    all earlier tokens of its document. Causal.

    q_features and k_features ``[batch, local tokens, heads, features]``, positive, of q and k with
    the scale in them (see :mod:`ringattn.mixers.features`); k, v ``[batch, local tokens, kv_heads,
    dim]``. What the features have within the block is taken off, in float32: where less than 1e-5
    of it is left, nothing is. Returns what q is like. Collective over ``group``.
    """
    comm = connect(group)
    values = v.repeat_interleave(q.shape[2] // v.shape[2], 2).to(state_dtype(v.dtype))
    values = torch.cat([values, values.new_ones(*values.shape[:3], 1)], -1)
    sums = []
    for name, lengths in (
        ("all", blocks.lengths),
        ("own", (blocks.stops - blocks.starts).tolist()),
    ):
        segments = blocks.remember(
            ("segments", name), partial(Segments, blocks.layout, lengths, None)
        )
        sums.append(
            linear(q_features, k_features, values, segments=segments, group=comm, scale=1.0)
        )
    rest, weight = (sums[0] - sums[1]).split([v.shape[3], 1], -1)
    there = (weight > _DIGITS * sums[0][..., -1:]) & (weight > _LEAST)
    weight = torch.where(there, weight, 1.0)
    lse = torch.where(there, weight.log(), -torch.inf)[..., 0].mT
    state = State(torch.where(there, rest / weight, 0.0), lse)
    near = Part(k, v, blocks.plan(blocks.near(1)))
    return combine(q, [near], [state], comm, kernel, scale)


def _documents(blocks: Blocks) -> Blocks:
    """Each document as one block."""
    return blocks.of(max(blocks.lengths, default=1))


def _document(blocks: Blocks, at: np.ndarray) -> np.ndarray:
    """The document of each position."""
    return np.searchsorted(np.cumsum(blocks.lengths), at, side="right")


def _of_documents(blocks: Blocks, documents: Blocks) -> Any:
    """All blocks with the owner of their document."""
    owner = np.zeros(len(blocks.lengths), np.int64)
    owner[documents.document] = documents.owner
    return layout_of(owner[blocks.document], blocks.world)


def _over_memory(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: Blocks,
    slots: int,
    comm: Comm,
    kernel: str,
    scale: float | None,
) -> torch.Tensor:
    """Every token over all ``slots`` summaries of its document."""
    plan = documents.plan(documents.whole(slots), documents.summaries(slots))
    return union(q, [Part(k, v, plan)], comm, kernel, scale)


def pseudo_inverse(a: torch.Tensor, steps: int) -> torch.Tensor:
    """The pseudo-inverse of ``[..., m, m]`` by the iteration of Razavi et al. (Nystromformer,
    section 3.2)."""
    one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    sizes = a.abs().sum(-1).amax(-1) * a.abs().sum(-2).amax(-1)
    z = a.mT / sizes[..., None, None]
    for _ in range(steps):
        az = a @ z
        z = z @ (13 * one - az @ (15 * one - az @ (7 * one - az))) / 4
    return z
