"""Mixers: what a layer may do with its tokens besides softmax attention over a mask, over split
sequences.

>>> segments = ringattn.make_segments(ringattn.masks.documents(lengths), layout)
>>> out = ringattn.mixers.delta(q, k, v, beta, decay, segments=segments, group=group)
>>> blocks = ringattn.make_blocks(ringattn.masks.documents(lengths), layout, 64)
>>> out = ringattn.mixers.moba(q, k, v, blocks=blocks, top_k=4, group=group)

``naive`` and ``naive_attention`` hold the definitions. ``linear``, ``delta``, ``scan`` and ``conv``
compute them on a rank's tokens, which may lie in any segments; packed documents each begin with a
state of 0. What chooses or summarises keys is made of ``union``, one softmax over several sets of
keys with a plan each, and ``pool``, summaries of blocks wherever their tokens lie.
"""

from ringattn.mixers import features, naive, naive_attention
from ringattn.mixers.conv import conv
from ringattn.mixers.hashed import hashed, lsh, nearest
from ringattn.mixers.low_rank import linformer, luna, nystrom, scatterbrain
from ringattn.mixers.pooled import pooled
from ringattn.mixers.pooling import pool
from ringattn.mixers.recurrent import delta, linear
from ringattn.mixers.routed import dsa, moba, nsa, selected
from ringattn.mixers.scan import scan
from ringattn.mixers.span import adaptive_span
from ringattn.mixers.union import Part, Rows, State, combine, union

__all__ = [
    "Part", "Rows", "State", "adaptive_span", "combine", "conv", "delta", "dsa", "features",
    "hashed", "linear", "linformer", "lsh", "luna", "moba", "naive", "naive_attention", "nearest",
    "nsa", "nystrom", "pool", "pooled", "scan", "scatterbrain", "selected", "union",
]  # fmt: skip
