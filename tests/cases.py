"""Random masks and layouts that several test files draw from."""

from hypothesis import strategies as st

import ringattn as ra


@st.composite
def masks(draw, max_n=48):
    n = draw(st.integers(1, max_n))
    kind = draw(st.sampled_from(["causal", "full", "window", "two_sided", "docs", "prefix", "mix"]))
    window = draw(st.integers(1, n))
    if kind == "causal":
        return ra.masks.causal(n)
    if kind == "full":
        return ra.masks.full(n)
    if kind in ("window", "two_sided"):
        return ra.masks.sliding_window(n, window, causal=kind == "window")
    if kind == "prefix":
        return ra.masks.prefix_lm(n, window)
    lengths, left = [], n
    while left:
        lengths.append(draw(st.integers(1, left)))
        left -= lengths[-1]
    docs = ra.masks.documents(lengths, causal=draw(st.booleans()))
    if kind == "docs":
        return docs
    # A window with sinks, minus some documents: rows without any key occur.
    return (ra.masks.sliding_window(n, window) | ra.masks.sinks(n, 2)) - docs


def layouts(n, max_world):
    build = st.sampled_from(list(ra.layouts.BUILDERS.values()))
    return st.builds(lambda make, world: make(n, world), build, st.integers(1, max_world))
