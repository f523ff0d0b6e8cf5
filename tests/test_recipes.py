"""The recipes of configs/experiment, from files to files; continue_llama shrunk to this machine."""

import json

import pytest
import torch
import transformers

from ringattn.cli import main as cli
from ringattn.training import config

from .processes import ROOT, metrics, train

WORDS = [
    "the", "ring", "goes", "round", "while", "keys", "and", "values", "travel", "on", "to", "all",
]  # fmt: skip


def test_continue_llama_from_text_to_a_longer_model(tmp_path, capsys):
    lines = [" ".join(WORDS[(i * k) % 12] for k in range(5 + 7 * (i % 9))) for i in range(120)]
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.jsonl").write_text(
        "".join(json.dumps({"text": line}) + "\n" for line in [*lines, "cut"][:-1]) + '{"text"\n'
    )
    model, tokens = tmp_path / "model", tmp_path / "tokens"
    model.mkdir()
    text = f"root={tmp_path / 'text'}"
    assert cli(["bpe", text, "vocab_size=300", f"out={model / 'tokenizer.json'}"]) == 0
    assert cli(["tokenize", text, f"tokenizer={model}", f"out={tokens}", "workers=1"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["corrupt"] == 1
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, vocab_size=320, max_position_embeddings=8192,
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0,
                         "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192},
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(model)
    recipe = [
        "experiment=continue_llama", f"model.path={model}", f"data.root={tokens}", "seq_len=320",
        "train.steps=3", "train.grad_accum=2", "memory.ffn_tile=64", "memory.loss_chunk=50",
        "optim.lr=1e-2", "optim.warmup_tokens=0", "eval.every=3", "eval.holdout=0.1",
        "eval.lengths=[320]", "checkpoint.every=2", "logger=none", "parallel.timeout_s=60",
    ]  # fmt: skip
    assert cli(["estimate", "ranks=2", *recipe]) == 0
    assert "predicted memory" in capsys.readouterr().out
    run_dir = tmp_path / "run"
    status, output = train(2, *recipe, f"run_dir={run_dir}")
    assert status == 0, output
    losses = [m["loss"] for m in metrics(run_dir)]
    assert len(losses) == 3 and losses[-1] < losses[0]
    for shown in ("1 corrupt records left out", "best_fit leaves", "held-out loss", "passkey"):
        assert shown in output, output
    assert (run_dir / "passkey.png").exists() and (run_dir / "loss_by_position.png").exists()
    out = tmp_path / "longer"
    export = [f"checkpoint={run_dir}", f"out={out}", f"tokenizer={model}", "dtype=float32"]
    assert cli(["export", *export]) == 0
    longer = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert longer.config.rope_parameters["rope_type"] == "yarn"
    assert longer.config.rope_parameters["factor"] == 128 and (out / "tokenizer.json").exists()
    assert torch.isfinite(longer(torch.arange(20)[None]).logits).all()


@pytest.mark.parametrize(
    "name", [path.stem for path in sorted((ROOT / "configs/experiment").glob("[!_]*.yaml"))]
)
def test_every_recipe_composes(name, tmp_path):
    if name == "continue_llama":
        transformers.LlamaConfig().save_pretrained(tmp_path)
        more = [f"model.path={tmp_path}", "data.root=x"]
    elif name == "continue_small":
        more = [f"model.path={ROOT / 'examples/million_tokens/base'}"]
    else:
        more = []
    run = config.load([f"experiment={name}", *more])
    world = 2 if name == "continue_small" else 8
    config.resolved(run, run.ranks or world)
