"""The examples run as they say, and give the same numbers on one rank and on several."""

import re

import pytest

from .processes import ROOT, launch


def losses(world, name, *arguments):
    status, output = launch(world, ROOT / "examples" / name, *arguments)
    assert status == 0, output[-4000:]
    return [float(x) for x in re.search(r"losses \[(.*)\]", output)[1].split(",")], output


@pytest.mark.parametrize(
    ("name", "worlds"),
    [("continue_window.py", (1, 3)), ("grpo.py", (1, 2)), ("sft_chats.py", (1, 2))],
)
def test_an_example_gives_the_same_on_one_and_several_ranks(name, worlds):
    (alone, _), (together, output) = (losses(world, name) for world in worlds)
    assert together == pytest.approx(alone, rel=1e-4, abs=1e-6) and len(alone) >= 6
    if name != "grpo.py":
        assert "ringattn: " in output  # the plan
        assert alone[-1] < alone[0]
