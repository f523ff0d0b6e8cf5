"""What a model that somebody else has trained asks of a run, and of an export."""

import json

import pytest
import transformers
import yaml

from ringattn.cli import main as cli
from ringattn.data.records import Source
from ringattn.data.shards import write
from ringattn.data.tokenizer import TokenizerKeys, train_bpe
from ringattn.training import config
from ringattn.training.fits import beyond
from ringattn.training.job import prepare
from ringattn.typed import SettingsError

from .processes import TINY
from .test_hf import MODELS, make

KEYS = [key for key in TINY if not key.startswith("model")]
TEXTS = ["the ring goes round and round", "keys travel, queries stay"] * 9


def other_ids(source, path):
    """The same tokenizer with two tokens exchanged."""
    read = json.loads(source.read_text())
    ids = read["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    path.write_text(json.dumps(read))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model/ with its tokenizer, text/, other.json, and text tokenized by both."""
    at = tmp_path_factory.mktemp("fits")
    make(MODELS["llama"], at / "model")
    train_bpe(TEXTS, 290, at / "model/tokenizer.json")
    other_ids(at / "model/tokenizer.json", at / "other.json")
    (at / "text").mkdir()
    (at / "text/a.txt").write_text("\n".join(TEXTS))
    (at / "text/a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for name, tokenizer in (("own", "model/tokenizer.json"), ("others", "other.json")):
        keys = TokenizerKeys(str(at / tokenizer))
        write(Source.open(str(at / "text"), "*.txt"), at / name, keys)
    return at


def prepared(folder, *keys, model="hf"):
    made = [*KEYS, f"model={model}", f"model.path={folder}/model", f"data.cache={folder}/cache"]
    run = config.resolved(config.load([*made, *keys]), 1)
    return prepare(run, folder / "run", 1)


@pytest.mark.parametrize("model", ["hf", "transformers"])
def test_bytes_are_refused_for_a_model_with_a_tokenizer(folder, model):
    text = [f"data.root={folder}/text", "data.glob=*.txt"]
    before = list(folder.glob("cache/*/tokens.json"))
    with pytest.raises(SettingsError, match=r"is bytes, .*give data\.tokenizer=.*model, or"):
        prepared(folder, *text, model=model)
    with pytest.raises(SettingsError, match="the data is bytes"):
        prepared(folder, text[0], "data.glob=*.jsonl", model=model)
    assert list(folder.glob("cache/*/tokens.json")) == before  # nothing was tokenized
    with pytest.raises(SettingsError, match="the data is bytes"):
        prepared(folder, "data=passkey", "seq_len=128", model=model)
    said = prepared(folder, *text, "data.tokenizer=bytes", model=model).data.remarks[0]
    assert "(bytes)" in said
    job = prepared(folder, *text, f"data.tokenizer={folder}/model", model=model)
    assert "(bytes)" not in job.data.remarks[0]


def test_tokens_of_another_tokenizer_of_the_same_size_are_refused(folder):
    prepared(folder, f"data.root={folder}/own", "data.format=tokens")
    with pytest.raises(SettingsError, match=r"2 differ, token \d+ is 'b' and 'a'|'a' and 'b'"):
        prepared(folder, f"data.root={folder}/others", "data.format=tokens")
    with pytest.raises(SettingsError, match="not those of the model"):
        prepared(folder, f"data.root={folder}/text", f"data.tokenizer={folder}/other.json")


def test_a_control_token_may_have_another_name(folder, tmp_path):
    read = json.loads((folder / "model/tokenizer.json").read_text())
    read["added_tokens"][0]["content"] = "<|im_end|>"
    read["model"]["vocab"]["<|im_end|>"] = read["model"]["vocab"].pop("<|endoftext|>")
    renamed = tmp_path / "tokenizer.json"
    renamed.write_text(json.dumps(read))
    prepared(folder, f"data.root={folder}/text", "data.glob=*.txt", f"data.tokenizer={renamed}")


def test_a_tokenizer_that_the_run_did_not_learn_is_not_exported(folder, tmp_path, capsys):
    from .processes import train

    keys = [f"data.root={folder}/own", "data.format=tokens", "model.vocab_size=290",
            "train.steps=1", f"run_dir={tmp_path}/run"]  # fmt: skip
    status, output = train(1, *TINY, *keys)
    assert status == 0, output
    export = ["export", f"checkpoint={tmp_path}/run"]
    assert cli([*export, f"out={tmp_path}/wrong", f"tokenizer={folder}/other.json"]) == 2
    assert "is not that of the run" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()
    assert cli([*export, f"out={tmp_path}/right", f"tokenizer={folder}/model"]) == 0
    # As a run whose config says bytes, and one in a mixture.
    config_of = tmp_path / "run/config.yaml"
    was = config_of.read_text()
    told = yaml.safe_load(was)
    told["data"] |= {"root": f"{folder}/text", "format": "auto"}
    config_of.write_text(yaml.safe_dump(told))
    assert cli([*export, f"out={tmp_path}/wrong", f"tokenizer={folder}/model"]) == 2
    assert "tokens are bytes" in capsys.readouterr().err
    told["data"] |= {"mix": [{"root": f"{folder}/own", "weight": 1}, {"root": "x", "weight": 1}]}
    config_of.write_text(yaml.safe_dump(told))
    assert cli([*export, f"out={tmp_path}/wrong", f"tokenizer={folder}/other.json"]) == 2


def test_a_wrong_folder_is_what_is_said_of_it(folder):
    with pytest.raises(ValueError, match="nowhere") as error:
        prepared(folder, "data.root=/nowhere", "data.format=tokens")
    assert "bytes" not in str(error.value)


@pytest.mark.parametrize(
    ("keys", "shown"),
    [
        (["seq_len=64"], None),
        (["seq_len=65"], "65 tokens, and the model was made for 64 (max_position_embeddings"),
        (["seq_len=256"], "model.rope.factor=4"),
        (["seq_len=256", "model.rope.type=yarn", "model.rope.factor=4"], None),
        (["seq_len=512", "model.rope.type=yarn", "model.rope.factor=4"], "made for 256 (model.ro"),
        (["seq_len=512", "model.rope.theta=500000.0"], None),
    ],
)
def test_texts_longer_than_a_model_was_made_for_are_named(folder, keys, shown):
    run = config.load([*KEYS, "model=hf", f"model.path={folder}/model", "data.root=x", *keys])
    said = beyond(run)
    assert said is None if shown is None else shown in said


ROPES = {
    # As Llama 3.1: 8,192 stretched to 131,072 by more than the factor.
    "llama3": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    # As Qwen 3 with the factor of its model card, max_position_embeddings left as it was.
    "yarn": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
             "original_max_position_embeddings": 64},
}  # fmt: skip


@pytest.mark.parametrize(
    ("rope", "most", "keys", "shown"),
    [
        ("llama3", 256, ["seq_len=256"], None),
        ("llama3", 256, ["seq_len=512"], "256 (max_position_embeddings"),
        ("llama3", 256, ["seq_len=512"], "model.rope.original_length=16 model.rope.factor=32 "),
        ("llama3", 256, ["seq_len=512", "model.rope.type=yarn", "model.rope.factor=32"], None),
        ("llama3", 256, ["seq_len=512", "model.rope.type=yarn", "model.rope.factor=2"],
         "made for 32 (model.rope.original_length"),
        ("llama3", 256, ["seq_len=512", "model.rope.theta=9e6"], None),
        ("yarn", 64, ["seq_len=256"], None),
        ("yarn", 64, ["seq_len=300"], "made for 256 (the RoPE of its config.json)"),
        ("yarn", 64, ["seq_len=300"], "model.rope.original_length=64 model.rope.factor=8 "),
    ],
)  # fmt: skip
def test_a_stretched_rope_counts_from_what_it_was_stretched_from(tmp_path, rope, most, keys, shown):
    made = {"rope_parameters": ROPES[rope], "max_position_embeddings": most}
    transformers.LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, vocab_size=300, architectures=["LlamaForCausalLM"], **made,
    ).save_pretrained(tmp_path)  # fmt: skip
    for model in ("hf", "transformers") if len(keys) == 1 else ("hf",):
        model_keys = [f"model={model}", f"model.path={tmp_path}", "data.root=x"]
        said = beyond(config.load([*KEYS, *model_keys, *keys]))
        if shown is None:
            assert said is None
        elif model == "hf":
            assert shown in said
        elif "model.rope" not in shown:
            assert shown.partition(" ")[0] in said and "yarn" in said


def test_they_are_named_of_an_unchanged_model_and_in_an_estimate(folder, capsys):
    path = f"model.path={folder}/model"
    run = config.load([*KEYS, "model=transformers", path, "data.root=x", "seq_len=100"])
    assert "rope_type yarn and factor 2 in its config.json" in beyond(run)
    assert cli(["estimate", "model=hf", path, "seq_len=4k", "ranks=2", "hardware=h100"]) == 0
    assert "texts of up to 4,096 tokens" in capsys.readouterr().out


def test_the_folder_is_one_of_transformers(folder):
    assert transformers.AutoConfig.from_pretrained(folder / "model").max_position_embeddings == 64
