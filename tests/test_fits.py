"""What a model that somebody else has trained asks of a run, and of an export."""

import json

import pytest
import transformers

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
    with pytest.raises(SettingsError, match=r"data\.tokenizer=.*model \(or bytes"):
        prepared(folder, *text, model=model)
    with pytest.raises(SettingsError, match="would become bytes"):
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


def test_they_are_named_of_an_unchanged_model_and_in_an_estimate(folder, capsys):
    path = f"model.path={folder}/model"
    run = config.load([*KEYS, "model=transformers", path, "data.root=x", "seq_len=100"])
    assert "rope_type yarn and factor 2 in its config.json" in beyond(run)
    assert cli(["estimate", "model=hf", path, "seq_len=4k", "ranks=2", "hardware=h100"]) == 0
    assert "texts of up to 4,096 tokens" in capsys.readouterr().out


def test_the_folder_is_one_of_transformers(folder):
    assert transformers.AutoConfig.from_pretrained(folder / "model").max_position_embeddings == 64
