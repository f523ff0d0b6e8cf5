"""Ulysses: heads split over groups of neighbouring ranks (Jacobs et al. 2023, "DeepSpeed Ulysses").

Inside a group of u ranks an all-to-all gives every member all tokens of the group and a share of
the heads; the rest of the plan then sees each group as one rank. Pure data; the executor moves it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from ringattn.planning.layouts import Layout
from ringattn.planning.runs import Run


@dataclass(frozen=True)
class HeadSplit:
    """The group of one rank. ``members`` are its group ranks, ``member`` its own place among them.

    ``q_rows[i]``/``k_rows[i]`` are the rows of the group's tokens that are member i's tokens, in
    their local order.
    """

    members: tuple[int, ...]
    member: int
    q_rows: tuple[tuple[Run, ...], ...]
    k_rows: tuple[tuple[Run, ...], ...]

    @property
    def degree(self) -> int:
        return len(self.members)

    def q_heads(self, member: int, heads: int) -> range:
        """The query heads that ``member`` computes."""
        share = heads // self.degree
        return range(member * share, (member + 1) * share)

    def kv_heads(self, member: int, heads: int, kv_heads: int) -> list[int]:
        """The K/V heads that ``member`` reads, in the order of its query heads and grouped evenly.

        With fewer K/V heads than members they are replicated.
        """
        own, together = self.q_heads(member, heads), heads // kv_heads
        even = gcd(len(own), together)
        return [first // together for first in own[::even]]

    def replicates(self, heads: int, kv_heads: int) -> bool:
        """Whether some K/V head is read by several members, or twice by one."""
        lists = (self.kv_heads(member, heads, kv_heads) for member in range(self.degree))
        return sum(map(len, lists)) > kv_heads


def legal_degrees(world: int, heads: int) -> list[int]:
    """The ulysses degrees that divide both the world and the number of query heads."""
    common = gcd(world, heads)
    return [u for u in range(1, common + 1) if common % u == 0]


def check_heads(heads: int, kv_heads: int) -> None:
    """ValueError, with the legal ones listed, for K/V heads that do not divide the heads."""
    if heads % kv_heads:
        legal = ", ".join(str(d) for d in range(1, heads + 1) if heads % d == 0)
        raise ValueError(
            f"kv_heads={kv_heads} does not divide {heads} heads; choose one of: {legal}"
        )


def check_degree(ulysses: int, world: int, heads: int) -> None:
    """ValueError, with the legal ones listed, for a degree that does not divide world and heads."""
    legal = legal_degrees(world, heads)
    if ulysses not in legal:
        raise ValueError(
            f"ulysses={ulysses} does not divide both {world} ranks and {heads} heads; "
            f"choose one of: {', '.join(map(str, legal))}"
        )


def split(rank: int, degree: int, q_layout: Layout, k_layout: Layout) -> HeadSplit:
    """The group of ``rank``: ``degree`` neighbouring ranks."""
    group, member = divmod(rank, degree)
    members = tuple(range(group * degree, (group + 1) * degree))
    q_rows, k_rows = (_rows(layout, group, degree, members) for layout in (q_layout, k_layout))
    return HeadSplit(members, member, q_rows, k_rows)


def _rows(
    layout: Layout, group: int, degree: int, members: tuple[int, ...]
) -> tuple[tuple[Run, ...], ...]:
    """Per member, its runs as rows of the merged layout."""
    merged = layout.merged(degree).numbered(group)
    rows = []
    for rank in members:
        places = []
        for run in layout.runs[rank]:
            first, whole = next((f, w) for f, w in merged if len(w & run) == len(run))
            begin = first + (run.start - whole.start) // whole.step
            places.append(Run(begin, begin + len(run)))
        rows.append(tuple(places))
    return tuple(rows)
