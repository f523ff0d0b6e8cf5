"""What plans and training steps cost, before they run.

``layer``: bytes, buffers and FLOPs of one attention layer, exact. ``hardware``: what a machine can
do. ``timeline``: the layer's steps in time, exchanges behind kernels. ``model``: FLOPs, traffic and
memory of a whole training step. ``step``: its seconds. ``search``: the best split of a run.
"""

from ringattn.cost.hardware import Hardware
from ringattn.cost.layer import (
    AttentionShape,
    Bytes,
    lower_bound,
    received,
    received_states,
    state_exchanges,
)
from ringattn.cost.timeline import Timeline, sample, simulate
from ringattn.planning.buffers import Buffers, buffers

__all__ = [
    "AttentionShape",
    "Buffers",
    "Bytes",
    "Hardware",
    "Timeline",
    "buffers",
    "lower_bound",
    "received",
    "received_states",
    "sample",
    "simulate",
    "state_exchanges",
]
