"""Mixers: what a layer may do with its tokens besides softmax attention, over split sequences.

>>> segments = ringattn.make_segments(ringattn.masks.documents(lengths), layout)
>>> out = ringattn.mixers.delta(q, k, v, beta, decay, segments=segments, group=group)

``naive`` holds the definitions; ``linear``, ``delta``, ``scan`` and ``conv`` compute them on a
rank's tokens, which may lie in any segments. Packed documents each begin with a state of 0.
"""

from ringattn.mixers import features, naive
from ringattn.mixers.conv import conv
from ringattn.mixers.recurrent import delta, linear
from ringattn.mixers.scan import scan

__all__ = ["conv", "delta", "features", "linear", "naive", "scan"]
