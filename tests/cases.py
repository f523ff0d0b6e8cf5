"""Random masks, layouts and plans that several test files draw from."""

from hypothesis import strategies as st

import ringattn as ra
from ringattn.planning.schedules import BUILDERS

KINDS = [
    "causal", "full", "window", "two_sided", "docs", "prefix", "mix", "global", "block_local",
    "shifted", "dilated", "strided", "log_sparse", "chosen", "big_bird", "block_causal", "shared",
    "ids", "unequal",
]  # fmt: skip


def _parts(draw, n):
    lengths, left = [], n
    while left:
        lengths.append(draw(st.integers(1, left)))
        left -= lengths[-1]
    return lengths


@st.composite
def masks(draw, max_n=48, kinds=KINDS):
    m = ra.masks
    n = draw(st.integers(1, max_n))
    kind = draw(st.sampled_from(kinds))
    size = draw(st.integers(1, n))
    causal = draw(st.booleans())
    build = {
        "causal": lambda: m.causal(n),
        "full": lambda: m.full(n),
        "window": lambda: m.sliding_window(n, size),
        "two_sided": lambda: m.sliding_window(n, size, causal=False),
        "prefix": lambda: m.prefix_lm(n, size),
        "docs": lambda: m.documents(_parts(draw, n), causal),
        # A window with sinks, minus some documents: rows without any key occur.
        "mix": lambda: (m.sliding_window(n, size) | m.sinks(n, 2)) - m.documents(_parts(draw, n)),
        "global": lambda: (
            m.global_tokens(n, [0, size - 1], causal) | m.sliding_window(n, 2, causal)
        ),
        "block_local": lambda: m.block_local(n, size, causal),
        "shifted": lambda: m.shifted_block(n, size, causal=causal),
        "dilated": lambda: m.dilated(n, draw(st.integers(1, 5)), size, causal),
        "strided": lambda: m.strided(n, size, causal),
        "big_bird": lambda: m.big_bird(n, min(size, 5), 1, 2, 1, seed=size, causal=causal),
        "log_sparse": lambda: m.log_sparse(n, min(size, 5), causal),
        "chosen": lambda: m.chosen_blocks(
            n,
            size,
            [
                draw(st.lists(st.integers(0, -(-n // size) - 1), max_size=3))
                for _ in range(-(-n // size))
            ],
            causal,
        ),
        "block_causal": lambda: m.block_causal(n, size),
        "shared": lambda: m.shared_question(n - size, _parts(draw, size)),
        "ids": lambda: m.from_document_ids([draw(st.integers(-1, 2)) for _ in range(n)], causal),
        "unequal": lambda: m.causal(n, draw(st.integers(0, max_n))),
    }
    return build[kind]()


@st.composite
def plans(draw, max_n=48, max_world=8, kinds=KINDS, schedules=tuple(BUILDERS), ulysses=True):
    """A plan for any mask, layout, schedule and legal degree, with heads that allow it."""
    mask = draw(masks(max_n, kinds))
    world = draw(st.integers(1, max_world))
    divisors = st.sampled_from([d for d in range(1, world + 1) if world % d == 0])
    name = draw(st.sampled_from(ra.layouts.NAMES))
    chunk = draw(st.one_of(st.none(), st.integers(1, 9)))
    layout = (
        ra.layouts.balanced(mask, world, chunk)
        if name == "balanced"
        else ra.layouts.build(name, mask, world)
    )
    keys = layout
    if mask.n_q != mask.n_k or draw(st.booleans()):
        others = ["striped"] if name == "striped" else ["contiguous", "zigzag"]
        keys = ra.layouts.BUILDERS[draw(st.sampled_from(others))](mask.n_k, world)
    degree = draw(divisors) if ulysses else 1
    node = draw(divisors)
    if node % degree and degree % node:
        node = world
    schedule = draw(st.sampled_from(schedules))
    return ra.make_plan(mask, layout, schedule, degree, key_layout=keys, node_size=node)
