"""Positions and labels of whole sequences, which are then split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ringattn.planning.layouts import Layout

if TYPE_CHECKING:
    import torch

IGNORED = -100  # the label of a token that is not supervised


def position_ids(layout: Layout, rank: int, lengths: Sequence[int] | None = None) -> torch.Tensor:
    """int64 ``[tokens]``: where each token that ``layout`` gives to ``rank`` stands in the
    sequence, or from 0 in its document if the ``lengths`` of packed documents are given. Raises
    ValueError if these do not add up to the sequence.
    """
    own = layout.positions(rank)
    if lengths is not None:
        ends = _ends(lengths, layout.n)
        own = own - np.concatenate([[0], ends])[np.searchsorted(ends, own, side="right")]
    import torch  # here: data is planned without it

    return torch.from_numpy(own)


def shift_labels(tokens: torch.Tensor, lengths: Sequence[int] | None = None) -> torch.Tensor:
    """Labels of whole, not yet split sequences ``[batch, tokens]``: the next token; IGNORED at the
    end, and at the end of every packed document if their ``lengths`` are given. Shard afterwards:
    a shard does not know its next token.
    """
    labels = tokens.new_full(tokens.shape, IGNORED)
    labels[:, :-1] = tokens[:, 1:]
    if lengths is not None:
        labels[:, _ends([x for x in lengths if x], tokens.shape[1]) - 1] = IGNORED
    return labels


def _ends(lengths: Sequence[int], n: int) -> np.ndarray:
    ends = np.cumsum(lengths, dtype=np.int64)
    if (len(ends) and int(ends[-1])) != n:
        raise ValueError(f"documents of {sum(lengths)} tokens in a sequence of {n}")
    return ends
