"""The carriers where users take them from: see :mod:`ringattn.execution.carriers`."""

from ringattn.execution.carriers import ProcessRank, VirtualWorld, end_distributed

__all__ = ["ProcessRank", "VirtualWorld", "end_distributed"]
