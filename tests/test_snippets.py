"""The code and the commands of all pages: run, or held to what the commands take."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from ringattn import typed
from ringattn.cli import COMMANDS, calibrate, export, kernels, plan, tokenize, verify
from ringattn.training.run import TrainingRun

from .processes import ROOT, launch

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
# Where the code of a page is run, if not here.
RUN_BY = {
    "architecture.md": "test_architecture.py", "attention.md": "test_cli.py",
    "families.md": "test_families_page.py", "kernels.md": "test_cli.py",
    "mixers.md": "test_mixers.py", "start.md": "test_processes.py",
}  # fmt: skip
KEYS = {
    "plan": {*plan.KEYS}, "verify": {*verify.KEYS}, "kernels": {*kernels.KEYS},
    "calibrate": {*calibrate.KEYS}, "export": {*export.KEYS},
    "tokenize": {*tokenize.TOKENIZE}, "bpe": {*tokenize.BPE}, "report": set(), "info": set(),
}  # fmt: skip


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def small_llama(folder: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def test_every_page_with_code_is_run():
    coded = {page.name for page in PAGES if blocks(page, "python")}
    assert coded == {*RUN_BY, "models.md", "trainers.md"}
    for page, test in RUN_BY.items():
        assert f"docs/{page}" in (ROOT / "tests" / test).read_text()


def test_the_code_of_the_page_on_models_runs(tmp_path):
    small_llama(tmp_path)
    scope = {"FOLDER": tmp_path, "lengths": [30, 18], "world": 1, "rank": 0,
             "input_ids": torch.arange(48)[None] % 260,
             "supervised_tokens_of_all_ranks": 46}  # fmt: skip
    exec("\n".join(blocks(ROOT / "docs/models.md", "python")), scope)
    assert all(p.grad is not None for p in scope["model"].parameters())


def test_the_code_of_the_page_on_trainers_runs(tmp_path):
    """In one rank: its first block trains as it stands, but for steps and length."""
    script = tmp_path / "page.py"
    page = ROOT / "docs/trainers.md"
    train, generate, losses = blocks(page, "python")
    train = train.replace("cp=4", "cp=2")
    train = train.replace("max_length=131072", "max_length=256, use_cpu=True")
    train = train.replace("max_steps=100", "max_steps=2, report_to='none', save_strategy='no'")
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r} + "/tests"); sys.path.insert(0, {str(ROOT)!r} + "/examples")
import torch, trl, peft, transformers
import torch.distributed as dist
from sft_chats import bytes_tokenizer, made_up_chats, small_model
import ringattn.hf
from ringattn.comm import end_distributed
out, chats = {str(tmp_path / "out")!r}, made_up_chats(8)
tokenizer, model = bytes_tokenizer(), small_model()
{train}
prompt = torch.arange(8)[None]
model = trainer.model
{generate.replace("max_new_tokens=100", "max_new_tokens=3")}
model, group, rank = small_model(), dist.group.WORLD, dist.get_rank()
input_ids, labels = torch.arange(64)[None] % 260, None
plans = ringattn.hf.make_plans(model, ringattn.masks.causal(64), "zigzag", world=2)
{losses}
assert all(p.grad is not None for p in model.parameters())
print("page done")
end_distributed()
""")
    status, output = launch(2, script)
    assert status == 0 and output.count("page done") == 2, output[-3000:]


def commands(page: Path) -> list[list[str]]:
    """The words of every command line on a page, continued lines joined."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    page_lines = page.read_text().replace("\\\n", " ")
    lines += [x.strip() for x in re.findall(r"^    (?:ringattn|torchrun) .*$", page_lines, re.M)]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_understood(page):
    """Commands and keys exist: of the console script, of train.py, of the Makefile."""
    groups = {*typed.groups(TrainingRun), "experiment"}
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(page):
        pairs = [word.partition("=")[0] for word in words if re.match(r"[\w./]+=", word)]
        if words[0] == "make":
            assert words[1] in targets, words
        elif (what := ringattn_command(words)) is not None:
            assert what in COMMANDS, words
            if what in KEYS:
                assert {*pairs} <= KEYS[what], (words, {*pairs} - KEYS[what])
            elif what == "estimate":
                typed.check_keys(TrainingRun, pairs, groups)
        elif "train.py" in words or "ringattn.training" in words:
            own = [key for key in pairs if not key.startswith("hydra.")]
            typed.check_keys(TrainingRun, own, groups)


def ringattn_command(words: list[str]) -> str | None:
    """plan of `ringattn plan`, and of `torchrun ... -m ringattn plan`."""
    if words[0] == "ringattn":
        return words[1]
    at = words.index("-m") if "-m" in words else -1
    return words[at + 2] if at >= 0 and words[at + 1] == "ringattn" else None
