"""The examples run as they say, and give the same numbers on one rank and on several."""

import json
import re

import pytest
import transformers

from ringattn.cli import main as cli

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


def test_the_recipe_for_a_million_tokens_says_what_it_needs(tmp_path, capsys):
    page = (ROOT / "examples/sft_chats.py").read_text()
    (command,) = re.findall(r"ringattn (estimate [^#]*?)\n\n", page)
    transformers.Qwen2Config(
        hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        intermediate_size=18944, vocab_size=152064, architectures=["Qwen2ForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    words = command.replace("\\", "").replace("FOLDER", str(tmp_path)).split()
    assert cli([*words, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["ranked"]
    memory = found["memory"]
    said = [float(x) for x in re.findall(r"([\d.]+) GiB", page)]
    device = sum(memory[part] for part in ("states", "kept", "working"))
    gib = [device / 2**30, memory["host"] / 2**30]
    assert said == pytest.approx(gib, abs=0.06), gib
