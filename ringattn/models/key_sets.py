"""Attention over sets of keys that are chosen or summarised: the keys of one kind of such layers,
and the plans that say ahead what they cost, without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import model_validator

from ringattn.planning.blocks import Blocks
from ringattn.planning.layer_plans import SetPlans
from ringattn.planning.layouts import Layout, contiguous
from ringattn.planning.masks import Mask
from ringattn.planning.routing import expected
from ringattn.typed import Count, OneOf, Whole, settings

if TYPE_CHECKING:
    from ringattn.models.sizes import ModelConfig

# The keys that mixers have; another one would be without effect.
_USED = {
    "pooled": ("block", "near", "levels", "ratio", "how"),
    "moba": ("block", "top_k"),
    "nsa": ("block", "top_k", "window"),
    "hashed": ("block", "buckets", "rounds", "seed"),
    "scatterbrain": ("block", "features", "seed"),
    "adaptive_span": ("window", "ramp"),
}
NAMES = tuple(_USED)
_CHUNK = 64  # tokens of a chunk of linear attention
_TILE = 128  # keys of a tile of a block kernel


@settings
class KeySets:
    """A kind of layer that attends sets of keys, with the model's heads."""

    mixer: Annotated[Any, OneOf(*NAMES)]
    """pooled: near tokens, and summaries of the blocks before; moba: blocks that each head chooses;
    nsa: summaries, chosen blocks and a window, added by gates; hashed: tokens of one bucket of
    random rotations; scatterbrain: the own block, and linear attention to the rest; adaptive_span:
    a window for each head, whose length is learned."""
    block: Count = 64
    """Tokens of a block, or of a chunk of hashed."""
    near: Count = 1
    """pooled: blocks that are attended token by token, the own one among them."""
    levels: Count = 1
    """pooled: levels of summaries, each of blocks ratio times as large as the one before."""
    ratio: Count = 4
    """Of blocks from level to level."""
    how: Literal["mean", "max", "learned"] = "mean"
    """pooled: what a summary is; learned: a softmax over the block of logits of each token."""
    top_k: Count = 8
    """moba, nsa: blocks that a token attends, the own one among them."""
    window: Count = 512
    """nsa: tokens of its window; adaptive_span: of the longest span, of which training begins with
    half."""
    buckets: Count = 16
    """hashed: of a round, an even number, or 1."""
    rounds: Count = 2
    """hashed: rounds of buckets, under one softmax."""
    ramp: Count = 8
    """adaptive_span: tokens over which a span fades out, each a set of keys of its own."""
    features: Count = 64
    """scatterbrain: random features of a head (Performer's)."""
    seed: Whole = 0
    """Of rotations and random features: others in each layer, the same in each step."""

    @model_validator(mode="after")
    def _fits(self) -> KeySets:
        for field in fields(self):
            given = getattr(self, field.name) != field.default
            if field.name != "mixer" and given and field.name not in _USED[self.mixer]:
                used = ", ".join(_USED[self.mixer])
                raise ValueError(f"{self.mixer} has no {field.name}; its keys: {used}")
        if self.mixer == "hashed" and self.buckets % 2 and self.buckets > 1:
            raise ValueError(f"buckets must be even, got {self.buckets}")
        if self.mixer == "nsa" and self.top_k < 3:
            raise ValueError(f"nsa: top_k must be at least 3, got {self.top_k}")
        if self.levels > 1 and self.ratio < 2:
            raise ValueError("levels of summaries need a ratio of at least 2")
        return self

    @property
    def learns(self) -> bool:
        """Whether the layer has weights that plain attention has not."""
        return self.mixer in ("nsa", "adaptive_span") or (
            self.mixer == "pooled" and self.how == "learned"
        )

    @property
    def smallest(self) -> KeySets:
        """The same of single tokens, as far as it goes, for the self-check: a token sees the one
        before it through a summary or a choice then, not as a neighbour in its block or window, and
        through the finest summaries only. (moba of one block has nothing but neighbours.)"""
        if self.mixer == "moba" and self.top_k == 1:
            return self
        less = {"block": 1}
        if self.mixer == "pooled":
            less |= {"near": 1, "levels": 1}
        if self.mixer == "nsa":
            less |= {"window": 1}
        if self.mixer == "hashed":  # all tokens in one bucket
            less |= {"buckets": 1, "rounds": 1}
        if self.mixer == "adaptive_span":
            less = {}
        return replace(self, **less)

    def degree(self, ulysses: int, kv_heads: int) -> int:
        """Ranks that heads are split over where attention's are over ``ulysses``: 1 where heads
        choose together, or a head's window is its own."""
        alone = self.mixer == "adaptive_span" or (self.mixer == "nsa" and kv_heads % ulysses)
        return 1 if alone else ulysses

    def parameters(self, model: ModelConfig) -> int:
        """Beside attention's own."""
        if self.mixer == "adaptive_span":
            return model.heads
        if self.mixer == "nsa":
            return model.dim * 3 * model.heads
        return model.dim * model.kv_heads if self.learns else 0

    def matmul_parameters(self, model: ModelConfig) -> int:
        """Of these, those that multiply every token."""
        return 0 if self.mixer == "adaptive_span" else self.parameters(model)

    def blocks(self, layout: Layout, lengths: Sequence[int], ulysses: int = 1) -> Blocks:
        """Of documents of these lengths. Raises ValueError for a striped layout."""
        return Blocks(layout, lengths, self.block, None, ulysses)

    def plans(self, layout: Layout, lengths: Sequence[int], ulysses: int = 1) -> SetPlans:
        """What a layer attends, each set by its name. What is only chosen at run time has a
        stand-in with as many pairs, spread over all that may be chosen."""
        return _plans(self, layout, tuple(lengths), ulysses)

    def levels_of(self, blocks: Blocks) -> list[Blocks]:
        """pooled: the blocks of all levels, from fine to coarse."""
        return [blocks.of(blocks.size * self.ratio**level) for level in range(self.levels)]

    def masks(self, blocks: Blocks) -> list[tuple[str, tuple[Mask, ...]]]:
        """Of each set: (name, (mask, and where its keys are not the tokens their layout))."""
        own = ("own block", (blocks.near(1),))
        if self.mixer == "pooled":
            levels = self.levels_of(blocks)
            found = [("near", (blocks.near(self.near),))]
            for level, coarser in zip(levels, [*levels[1:], None], strict=True):
                mask = level.past(self.near, coarser)
                found.append((f"summaries of {level.size}", (mask, level.summaries())))
            return found
        if self.mixer == "moba":
            return [own, ("chosen", (expected(blocks, self.top_k - 1),))]
        if self.mixer == "nsa":
            return [
                ("summaries", (blocks.ended(), blocks.summaries())),
                own,
                ("chosen", (expected(blocks, self.top_k - 1),)),
                ("window", (blocks.window(self.window),)),
            ]
        if self.mixer == "hashed":
            # As many pairs as buckets in chunks have at most; where they lie is not known.
            return [(f"round {i + 1}", (blocks.near(2),)) for i in range(self.rounds)]
        if self.mixer == "adaptive_span":  # at its longest
            ramp = range(self.window + 1, self.window + self.ramp + 1)
            found = [("span", (blocks.back(0, self.window),))]
            return found + [(f"{back} back", (blocks.back(back, back),)) for back in ramp]
        return [own]

    def area(self, lengths: Sequence[int]) -> int:
        """Attended pairs of documents of these lengths."""
        return _area(self, tuple(lengths))


@lru_cache(maxsize=32)
def _plans(sets: KeySets, layout: Layout, lengths: tuple[int, ...], ulysses: int) -> SetPlans:
    blocks = sets.blocks(layout, lengths, ulysses)
    plans = {name: blocks.plan(*of) for name, of in sets.masks(blocks)}
    if sets.mixer in ("moba", "nsa"):
        few = sets.top_k - 1
        return SetPlans(sets, blocks, plans, scored=len(blocks), gathered=len(blocks), relaid=few)
    if sets.mixer == "hashed":
        scored = sets.rounds * sets.buckets // 2
        return SetPlans(
            sets, blocks, plans, scored=scored, relaid=2 * sets.rounds, moved=sets.rounds
        )
    if sets.mixer == "adaptive_span":  # each diagonal of the ramp is a tile of keys to a kernel
        return SetPlans(sets, blocks, plans, scored=6 * _TILE * sets.ramp)
    if sets.mixer == "scatterbrain":  # products with features and with states, twice
        scored = 4 * (_CHUNK + sets.features)
        return SetPlans(sets, blocks, plans, scored=scored, features=sets.features)
    return SetPlans(sets, blocks, plans)


@lru_cache(maxsize=4096)
def _area(sets: KeySets, lengths: tuple[int, ...]) -> int:
    plans = sets.plans(contiguous(sum(lengths), 1), lengths)
    return sum(plan.mask.area for plan in plans.plans.values())
