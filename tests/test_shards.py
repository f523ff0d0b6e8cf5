"""Token shards that are no longer what was written: found at the start or in the background."""

import json

import numpy as np
import pytest

from ringattn.data import records, shards
from ringattn.data.documents import DataError
from ringattn.data.integrity import Integrity
from ringattn.data.records import Source

from .processes import TINY, train


@pytest.fixture
def tokens(tmp_path):
    """Three shards of bytes."""
    lines = "".join(json.dumps({"text": "the ring goes round " * 40}) + "\n" for _ in range(30))
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text(lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "RANGE_BYTES", 1)
        shards.write(Source.open(str(tmp_path), "*.jsonl"), tmp_path / "tokens", workers=1)
    return tmp_path / "tokens"


def edit(path, at=100, value=b"\x41"):
    """In place, of the same size."""
    with path.open("rb+") as file:
        file.seek(at)
        file.write(value)


def integrity_of(folder, **how):
    found = shards.Shards(folder)
    with Integrity(found.files, folder.parent / "marks", **how) as integrity:
        left = integrity.finish(60)
    return integrity.problem, left


def test_shards_are_read_once_and_again_when_they_change(tokens, monkeypatch):
    read = []
    real = Integrity._read
    monkeypatch.setattr(
        Integrity, "_read", lambda self, path, *more: read.append(path.name) or real(
            self, path, *more)
    )  # fmt: skip
    assert integrity_of(tokens, first=1) == ("", 0)
    assert read == ["00001.tokens", "00002.tokens", "00000.tokens"]
    assert integrity_of(tokens) == ("", 0) and len(read) == 3
    edit(tokens / "00001.tokens")
    problem, left = integrity_of(tokens)
    assert "00001.tokens is not what was written" in problem and left == 2
    assert read[3:] == ["00001.tokens"]


def test_what_cannot_be_read_is_left_and_what_is_torn_is_damage(tokens, monkeypatch):
    path = tokens / "00001.tokens"
    found = shards.Shards(tokens)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with Integrity(found.files, tokens.parent / "marks") as integrity:
        integrity.finish(60)
    assert "00001.tokens ends in the middle of a token" in integrity.problem
    path.unlink()  # as a server that does not answer; training will hear of it
    with Integrity(found.files, tokens.parent / "marks") as integrity:
        assert integrity.finish(60) == 1
    assert integrity.problem == ""


def test_ids_ends_and_tokenizer_of_shards_are_checked(tokens):
    about = json.loads((tokens / "tokens.json").read_text())
    edit(tokens / "00002.tokens", 10, b"\xff\xff")
    assert "has token 65535; the vocabulary ends at 256" in integrity_of(tokens)[0]
    with pytest.raises(DataError, match=r"00002\.tokens has token 65535"):  # whoever is first
        shards.Shards(tokens).read(60, 0, 100)
    ends = np.fromfile(tokens / "00000.ends", "<i8")
    edit(tokens / "00000.ends", 0, (int(ends[0]) + 1).to_bytes(8, "little"))
    with pytest.raises(DataError, match=r"00000\.ends is not what was written"):
        shards.Shards(tokens)
    for shard in about["shards"]:
        del shard["ends_sha256"]  # as others write them
    (tokens / "tokens.json").write_text(json.dumps(about))
    assert len(shards.Shards(tokens).lengths) == 90
    for wrong in (ends[[1, 0, *range(2, 30)]], ends - 1, np.append(ends[:-1], ends[-2])):
        wrong.tofile(tokens / "00000.ends")
        with pytest.raises(DataError, match="one after the other"):
            shards.Shards(tokens)
    ends.tofile(tokens / "00000.ends")
    (tokens / "tokens.json").write_text(json.dumps(about | {"vocab_size": 300}))
    with pytest.raises(DataError, match="not the one that its tokens were made with"):
        _ = shards.Shards(tokens).tokenizer


def test_damaged_shards_end_a_run(tokens, tmp_path):
    """On all ranks, whichever has seen it; the same size, so nothing else tells."""
    keys = [*TINY, f"data.root={tokens}", f"data.cache={tmp_path}/cache", "train.steps=3",
            f"run_dir={tmp_path}/run", "checkpoint.every=1"]  # fmt: skip
    status, output = train(2, *keys)
    assert status == 0, output
    edit(tokens / "00001.tokens")
    status, output = train(2, *keys, "train.steps=100000")
    assert status == 1 and "00001.tokens is not what was written" in output, output
    assert output.count("is not what was written") == 1
