"""What to call a model with on one rank: tokens, positions and labels from the plan's one
source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ringattn.batches import IGNORED, position_ids, shift_labels
from ringattn.planning import masks
from ringattn.planning.layouts import Layout
from ringattn.planning.masks import Mask, pieces
from ringattn.planning.plan import Plan


def local_batch(
    plans: Plan | Mapping[str, Plan],
    rank: int,
    input_ids: torch.Tensor,
    labels: torch.Tensor | None = None,
    lengths: Sequence[int] | None = None,
) -> dict[str, torch.Tensor]:
    """What to call the model with on ``rank``, from whole sequences ``[batch, tokens]``.

    ``labels`` (default: the tokens) are as Hugging Face has them, not yet shifted; they are shifted
    here, before the split, and come as ``shift_labels``. Packed documents are read off the plans'
    masks: each counts its positions from 0, and its last token has no label. ``lengths`` of them
    may be given too, and must be the same. On several ranks the model wants ``num_items_in_batch``
    beside labels, as the Trainer gives it; for logits alone call it without ``labels`` and
    ``shift_labels``.

    Labels of an encoder, whose documents see themselves whole, are not shifted: they come as
    ``labels`` alone, if they are given.

    Raises ValueError if ``lengths`` are not those of the masks, ``input_ids`` of another length, or
    labels shifted already.
    """
    layout = (plans if isinstance(plans, Plan) else next(iter(plans.values()))).layout
    documents = lengths_of(plans)
    if lengths is not None and [int(x) for x in lengths if x] != documents:
        raise ValueError(
            f"lengths are of {len(lengths)} documents, {list(lengths)[:8]}, and the plan's mask "
            f"holds {len(documents)}, {documents[:8]}: make the plan with "
            f"masks.documents(lengths), or with make_plans(model, masks.documents(lengths), layout)"
        )
    if input_ids.shape[1] != layout.n:
        raise ValueError(f"input_ids have {input_ids.shape[1]} tokens, the plan {layout.n}")
    own = torch.from_numpy(layout.positions(rank)).to(input_ids.device)
    positions = positions_of(layout, rank, documents).to(input_ids.device)
    batch = {
        "input_ids": input_ids[:, own],
        "position_ids": positions.expand(len(input_ids), -1),
    }
    if both_ways(plans):
        return batch if labels is None else batch | {"labels": labels[:, own]}
    if labels is not None and input_ids.ndim == 2:  # not embeddings
        check_not_shifted(input_ids, labels)
    shifted = shift_labels(input_ids if labels is None else labels, documents)[:, own]
    return batch | {"labels": shifted, "shift_labels": shifted}


def check_not_shifted(ids: torch.Tensor, labels: torch.Tensor) -> None:
    """Raises ValueError for labels ``[batch, tokens]`` that somebody has shifted already: they are
    those of the next token, and not of their own."""
    wanted = labels != IGNORED
    own = (labels == ids)[wanted]
    following = (labels[:, :-1] == ids[:, 1:])[wanted[:, :-1]]
    if len(own) and not bool(own.all()) and len(following) and bool(following.all()):
        raise ValueError(
            "labels are those of the next token: they have been shifted (by the collator?), and "
            "would be shifted again; give labels that stand with their own tokens, as transformers "
            "does"
        )


def lengths_of(plans: Plan | Mapping[str, Plan]) -> list[int]:
    """Of the documents that no layer looks beyond."""
    known = masks_of(plans)
    return known[0].pieces if len(known) == 1 else pieces(known)


def masks_of(plans: Plan | Mapping[str, Plan]) -> list[Mask]:
    """The mask that all layers share, or where it is not known those of the kinds."""
    shared = getattr(plans, "shared", None)
    if shared is not None:
        return [shared]
    return [plans.mask] if isinstance(plans, Plan) else [plan.mask for plan in plans.values()]


def both_ways(plans: Plan | Mapping[str, Plan]) -> bool:
    """Whether the documents are an encoder's: every token of one sees all others."""
    whole = masks.documents(lengths_of(plans), causal=False)
    if sum(n > 1 for n in lengths_of(plans)) == 0:
        return False
    return any(mask.area == whole.area for mask in masks_of(plans))


def positions_of(layout: Layout, rank: int, lengths: Sequence[int]) -> torch.Tensor:
    """int64 ``[local tokens]``: where each token stands in its document."""
    return position_ids(layout, rank, lengths)
