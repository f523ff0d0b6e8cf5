"""What the mixers with chosen or summarised keys compute: dense, of whole sequences, in one
process, in the dtype of what is given. Every split version has to equal these.

Arguments are those of the mixers, with the ``lengths`` of the documents (None: one) and a ``size``
in tokens in place of blocks. Tensors are ``[batch, tokens, heads, dim]``; weights of pairs
``[batch, heads, queries, keys]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

Lengths = Sequence[int] | None


def pooled(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sizes: Sequence[int], near: int = 1,
    how: str = "mean", weights: torch.Tensor | None = None, causal: bool = True,
    lengths: Lengths = None,
) -> torch.Tensor:  # fmt: skip
    """See :func:`ringattn.mixers.pooled`; ``sizes`` of the levels."""
    place = _Places(q, lengths)

    def edge(size: int) -> torch.Tensor:
        """The first position in the document that is nearer than ``near`` blocks of a size."""
        return ((place.within // size - near + 1) * size).clamp(min=0)

    apart = place.within[None] // sizes[0] - place.within[:, None] // sizes[0]
    allowed = [place.same & (apart.abs() < near)]
    if causal:
        allowed = [place.earlier & (place.within[None] >= edge(sizes[0])[:, None])]
    keys, values, log = [k], [v], [q.new_zeros(q.shape[1])]
    for size, coarser in zip(sizes, [*sizes[1:], 0], strict=True):
        far = edge(coarser) if coarser else torch.zeros_like(place.within)
        for document, start, stop in _blocks(place.lengths, size):
            tokens = slice(start, stop)
            for x, all_of_them in ((k, keys), (v, values)):
                all_of_them.append(_summary(x[:, tokens], how, weights, tokens))
            begin, end = (place.within[start], place.within[stop - 1] + 1)
            seen = place.document == document
            if causal:
                seen = seen & (begin >= far) & (end <= edge(size))
            allowed.append(seen[:, None])
            log.append(q.new_full((1,), math.log(size) if causal else 0.0))
    scores = _scores(q, torch.cat(keys, 1)) + torch.cat(log)
    return _softmax(scores, torch.cat(allowed, 1), torch.cat(values, 1))


def moba(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: int, top_k: int,
    lengths: Lengths = None,
) -> torch.Tensor:  # fmt: skip
    """See :func:`ringattn.mixers.moba`."""
    blocks = _blocks(_lengths(q, lengths), size)
    means = torch.stack([k[:, start:stop].mean(1) for _, start, stop in blocks], 1)
    scores = torch.einsum("bthd,bchd->bhtc", q, _per_head(means, q)).detach()
    return _softmax(_scores(q, k), _chosen(scores, blocks, top_k - 1), v)


def nsa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gates: torch.Tensor, size: int,
    compressed: tuple[int, int], top_k: int, window: int, lengths: Lengths = None,
) -> torch.Tensor:  # fmt: skip
    """See :func:`ringattn.mixers.nsa`; ``compressed``: size and stride."""
    place = _Places(q, lengths)
    blocks, small = _blocks(place.lengths, size), _blocks(place.lengths, *compressed)
    k_mean, v_mean = (
        torch.stack([x[:, start:stop].mean(1) for _, start, stop in small], 1) for x in (k, v)
    )
    at = torch.arange(q.shape[1])
    seen = torch.stack(
        [(place.document == document) & (stop <= at + 1) for document, _, stop in small], 1
    )
    scores = _scores(q, k_mean)
    first = _softmax(scores, seen, v_mean)
    shares = _weights(scores, seen).detach()
    shares = shares.unflatten(1, (k.shape[2], -1)).sum(2).repeat_interleave(
        q.shape[2] // k.shape[2], 1
    )  # fmt: skip
    overlap = q.new_tensor([
        [max(0, min(stop, b) - max(start, a)) / compressed[1] for _, a, b in small]
        for _, start, stop in blocks
    ])  # fmt: skip
    important = torch.einsum("bhtc,jc->bhtj", shares, overlap)
    for own, (document, start, stop) in enumerate(blocks):  # its neighbour and the first one
        for forced in (own - 1, next(i for i, b in enumerate(blocks) if b[0] == document)):
            if forced >= 0:
                important[:, :, start:stop, forced] = torch.inf
    second = _softmax(_scores(q, k), _chosen(important, blocks, top_k - 1), v)
    third = _softmax(_scores(q, k), place.earlier & (at[None] > at[:, None] - window), v)
    each = zip((first, second, third), gates.unbind(-1), strict=True)
    return torch.stack([out * gate[..., None] for out, gate in each]).sum(0)


def dsa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index_q: torch.Tensor,
    index_k: torch.Tensor, index_weights: torch.Tensor, top_k: int, lengths: Lengths = None,
) -> torch.Tensor:  # fmt: skip
    """See :func:`ringattn.mixers.dsa`."""
    earlier = _Places(q, lengths).earlier
    products = torch.einsum("bthd,bcd->bthc", index_q, index_k).relu()
    scores = torch.einsum("bthc,bth->btc", products, index_weights)
    best = torch.sort(scores.masked_fill(~earlier, -torch.inf), dim=-1, descending=True,
                      stable=True).indices[..., :top_k]  # fmt: skip
    allowed = torch.zeros_like(scores, dtype=torch.bool).scatter(2, best, True) & earlier
    return _softmax(_scores(q, k), allowed[:, None], v)


def selected(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor, size: int,
    own: bool = True, lengths: Lengths = None,
) -> torch.Tensor:  # fmt: skip
    """See :func:`ringattn.mixers.selected`; no block twice."""
    allowed = torch.zeros(q.shape[0], ids.shape[2], q.shape[1], q.shape[1], dtype=torch.bool)
    for number, (_, start, stop) in enumerate(_blocks(_lengths(q, lengths), size)):
        allowed[..., start:stop] |= (ids == number).any(-1).transpose(1, 2)[..., None]
        if own:
            allowed[:, :, start:stop, start:stop] |= _triangle(stop - start)
    return _softmax(_scores(q, k), allowed.repeat_interleave(q.shape[2] // ids.shape[2], 1), v)


def linformer(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, project_k: torch.Tensor,
    project_v: torch.Tensor, lengths: Lengths = None,
) -> torch.Tensor:  # fmt: skip
    """See :func:`ringattn.mixers.linformer`."""

    def one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k = torch.einsum("bthd,tm->bmhd", k, project_k[: k.shape[1]])
        return _attention(q, k, torch.einsum("bthd,tm->bmhd", v, project_v[: v.shape[1]]))

    return _each(one, lengths, q, k, v)


def luna(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, memory: torch.Tensor,
    lengths: Lengths = None,
) -> torch.Tensor:  # fmt: skip
    """See :func:`ringattn.mixers.luna`."""

    def one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        packed = _attention(memory.transpose(0, 1)[None].expand(k.shape[0], -1, -1, -1), k, v)
        return _attention(q, packed, packed)

    return _each(one, lengths, q, k, v)


def nystrom(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: int, steps: int = 6,
    lengths: Lengths = None,
) -> torch.Tensor:  # fmt: skip
    """See :func:`ringattn.mixers.nystrom`."""
    from ringattn.mixers.low_rank import pseudo_inverse

    def one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = _per_head(k, q), _per_head(v, q)
        q_mean, k_mean = (torch.stack([x.mean(1) for x in y.split(size, 1)], 1) for y in (q, k))
        kernels = (_scores(*pair).softmax(-1) for pair in ((q, k_mean), (q_mean, k_mean),
                                                            (q_mean, k)))  # fmt: skip
        left, middle, right = kernels
        out = left @ pseudo_inverse(middle, steps) @ right @ v.transpose(1, 2)
        return out.transpose(1, 2)

    return _each(one, lengths, q, k, v)


def scatterbrain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_features: torch.Tensor,
    k_features: torch.Tensor, size: int, lengths: Lengths = None,
) -> torch.Tensor:  # fmt: skip
    """See :func:`ringattn.mixers.scatterbrain`."""
    place = _Places(q, lengths)
    near = place.within[:, None] // size == place.within[None] // size
    low_rank = torch.einsum("bqhd,bkhd->bhqk", q_features, k_features)
    weights = torch.where(near, _scores(q, k).exp(), low_rank) * place.earlier
    return _averaged(weights, v)


def hashed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, buckets: torch.Tensor, size: int,
    itself: bool = False, lengths: Lengths = None,
) -> torch.Tensor:  # fmt: skip
    """See :func:`ringattn.mixers.hashed`."""
    place, n = _Places(q, lengths), q.shape[1]
    times = q.new_zeros(q.shape[0], q.shape[2], n, n)
    for b, h, r in torch.cartesian_prod(*map(torch.arange, (*buckets.shape[::2], buckets.shape[3]))
                                        ).tolist():  # fmt: skip
        bucket = buckets[b, :, h, r]
        mates = (bucket[:, None] == bucket) & place.earlier
        chunk = (mates.sum(1) - 1) // size  # by the place in its bucket
        before = mates & ~torch.eye(n, dtype=torch.bool)
        apart = chunk[:, None] - chunk[None]
        seen = (mates if itself else before) & (apart >= 0) & (apart <= 1)
        seen |= torch.diag(~before.any(1))
        times[b, h] += seen
    return _averaged(_scores(q, k).exp() * times, v)


def adaptive_span(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: torch.Tensor, ramp: int = 32,
    lengths: Lengths = None,
) -> torch.Tensor:  # fmt: skip
    """See :func:`ringattn.mixers.adaptive_span`."""
    at = torch.arange(q.shape[1])
    back = (at[:, None] - at[None]).to(q.dtype)
    share = ((ramp + spans[:, None, None] - back) / ramp).clamp(0, 1)
    return _averaged(_scores(q, k).exp() * share * _Places(q, lengths).earlier, v)


class _Places:
    """Of every token its ``document`` and the place ``within`` it; of pairs whether they are of the
    ``same`` document, and whether the key is not later (``earlier``)."""

    def __init__(self, q: torch.Tensor, lengths: Lengths) -> None:
        self.lengths = _lengths(q, lengths)
        self.document = torch.cat([torch.full((n,), i) for i, n in enumerate(self.lengths)])
        self.within = torch.cat([torch.arange(n) for n in self.lengths])
        self.same = self.document[:, None] == self.document[None]
        self.earlier = self.same & (self.within[None] <= self.within[:, None])


def _lengths(q: torch.Tensor, lengths: Lengths) -> list[int]:
    return [q.shape[1]] if lengths is None else [n for n in lengths if n]


def _blocks(
    lengths: Sequence[int], size: int, stride: int | None = None
) -> list[tuple[int, int, int]]:
    """(document, start, stop) of every block."""
    found, at = [], 0
    for document, n in enumerate(lengths):
        starts = range(0, n, stride or size)
        found += [(document, at + start, at + min(n, start + size)) for start in starts]
        at += n
    return found


def _summary(
    x: torch.Tensor, how: str, weights: torch.Tensor | None, tokens: slice
) -> torch.Tensor:
    """``[batch, 1, heads, dim]`` of the tokens of a block."""
    if how == "softmax":
        if weights is None:
            raise ValueError("pooled: how='softmax' needs weights")
        return (x * weights[:, tokens].softmax(1)).sum(1, keepdim=True)
    return x.amax(1, keepdim=True) if how == "max" else x.mean(1, keepdim=True)


def _chosen(scores: torch.Tensor, blocks: list[tuple[int, int, int]], count: int) -> torch.Tensor:
    """Pairs ``[batch, heads, queries, keys]`` within the own block, and with the ``count`` best of
    the document's earlier blocks by ``scores`` ``[batch, heads, queries, blocks]``."""
    n = blocks[-1][2]
    allowed = torch.zeros(*scores.shape[:2], n, n, dtype=torch.bool)
    for own, (document, start, stop) in enumerate(blocks):
        allowed[:, :, start:stop, start:stop] = _triangle(stop - start)
        earlier = [i for i in range(own) if blocks[i][0] == document]
        best = torch.sort(scores[:, :, start:stop, earlier], dim=-1, descending=True, stable=True)
        for place, number in enumerate(earlier):
            taken = (best.indices[..., :count] == place).any(-1)
            allowed[:, :, start:stop, blocks[number][1] : blocks[number][2]] |= taken[..., None]
    return allowed


def _triangle(size: int) -> torch.Tensor:
    return torch.ones(size, size, dtype=torch.bool).tril()


def _per_head(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(q.shape[2] // x.shape[2], 2)


def _scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bqhd,bkhd->bhqk", q, _per_head(k, q)) * q.shape[-1] ** -0.5


def _weights(scores: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """0 in rows where nothing is allowed."""
    weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)
    return weights * allowed


def _softmax(scores: torch.Tensor, allowed: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = _weights(scores, allowed)
    return _mixed(weights, v)


def _averaged(weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return _mixed(weights / weights.sum(-1, keepdim=True), v)


def _mixed(weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    v = v.repeat_interleave(weights.shape[1] // v.shape[2], 2)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return _mixed(_scores(q, k).softmax(-1), v)


def _each(
    of_one: Callable[..., torch.Tensor], lengths: Lengths, *tensors: torch.Tensor
) -> torch.Tensor:
    """Each document by itself."""
    parts = (x.split(_lengths(tensors[0], lengths), 1) for x in tensors)
    return torch.cat([of_one(*document) for document in zip(*parts, strict=True)], 1)
