"""Which files are data, and what is in them: links, hidden folders, patterns, edits in place."""

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn.data import shards
from ringattn.data.contents import BLOCK, contents, read
from ringattn.data.documents import DataError
from ringattn.data.formats.ranges import Corrupt
from ringattn.data.listing import list_files
from ringattn.data.open_data import open_data
from ringattn.data.records import Source
from ringattn.training import config

from .processes import TINY


def names(root, pattern="**/*"):
    return [name for name, _ in list_files(str(root), pattern)[1]]


def put(path, text="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_links_are_followed_once_and_cycles_end(tmp_path):
    root, far = tmp_path / "root", tmp_path / "far"
    put(root / "a.txt")
    put(root / "sub/b.txt")
    put(far / "c.txt")
    put(far / "deep/d.txt")
    (root / "sub/up").symlink_to(root)  # a cycle
    (root / "0-again").symlink_to(root / "sub")  # earlier by name than what it leads to
    (root / "0.txt").symlink_to(root / "a.txt")
    (root / "far").symlink_to(far)
    (root / "farther").symlink_to(far / "deep")
    (root / "one.txt").symlink_to(far / "c.txt")  # which is also in far
    (far / "back").symlink_to(root)
    assert names(root) == ["a.txt", "far/c.txt", "far/deep/d.txt", "sub/b.txt"]
    # As in a hub's cache: what is matched is links, and what they lead to is not.
    put(tmp_path / "hub/blobs/x1", "{}")
    (tmp_path / "hub/data").mkdir()
    (tmp_path / "hub/data/x.jsonl").symlink_to("../blobs/x1")
    assert names(tmp_path / "hub", "**/*.jsonl") == ["data/x.jsonl"]
    assert names(tmp_path / "hub", "data/*.jsonl") == ["data/x.jsonl"]


def test_a_folder_may_match_in_two_ways(tmp_path):
    put(tmp_path / "a/b/sub/f.txt")
    put(tmp_path / "a/b/g.txt")
    (tmp_path / "c").symlink_to(tmp_path / "a/b")
    assert names(tmp_path, "*/*/*.txt") == ["a/b/g.txt", "c/sub/f.txt"]


def test_links_that_lead_nowhere_are_named(tmp_path):
    put(tmp_path / "a.txt")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "missing")
    (tmp_path / ".#lock").symlink_to("nobody@nowhere")  # an editor's
    for pattern in ("**/*", "*.txt", "**/*.md"):  # of **, it might have been a folder
        with pytest.raises(DataError, match=r"gone\.txt is a link to .*missing, which leads"):
            names(tmp_path, pattern)
    assert names(tmp_path, "a*") == ["a.txt"]


def test_hidden_files_and_version_control_are_left_out_unless_named(tmp_path):
    for name in ("a.py", ".hidden.py", ".git/objects/x.py", "sub/.svn/y.py", "sub/CVS/z.py",
                 "sub/b.py"):  # fmt: skip
        put(tmp_path / name)
    assert names(tmp_path) == names(tmp_path, "**/*.py") == ["a.py", "sub/b.py"]
    assert names(tmp_path, "**/.*") == [".hidden.py"]
    assert names(tmp_path, ".git/**/*.py") == [".git/objects/x.py"]
    assert names(tmp_path, "**/CVS/*") == ["sub/CVS/z.py"]
    # A root that is itself hidden was named.
    assert names(tmp_path / ".git") == ["objects/x.py"]


PART = st.sampled_from(["a", "b", "ab", "c.txt", "**", "*", "a*", "*.txt", "?", "[ab]"])


@settings(max_examples=150, deadline=None)
@given(st.lists(PART, min_size=1, max_size=4))
def test_patterns_are_those_of_pathlib(tmp_path_factory, parts):
    root = tmp_path_factory.getbasetemp() / "tree"
    if not root.exists():
        for name in ("a/a/c.txt", "a/b/ab", "b/c.txt", "ab/a/b/c.txt", "c.txt", "a/c.txt", "ab/b"):
            put(root / name)
    if parts[-1] == "**":
        parts.append("*")
    pattern = "/".join(parts)
    want = {str(p.relative_to(root)) for p in root.glob(pattern) if p.is_file()}
    try:
        assert names(root, pattern) == sorted(want)
    except DataError:
        assert not want


@pytest.mark.parametrize("pattern", ["", "/", "/etc/*", "../*", "a/../b", "."])
def test_patterns_stay_below_the_root(tmp_path, pattern):
    put(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"data\.glob="):
        names(tmp_path, pattern)


def opened(root, *keys):
    run = config.load([*TINY, f"data.root={root}", f"data.cache={root}.cache", *keys])
    return open_data(run.data, run.seq_len, run.seed, lambda *_: None)


def test_an_edit_in_place_is_other_data_and_seen_in_mid_run(tmp_path):
    root = tmp_path / "text"
    put(root / "a.txt", "one text")
    put(root / "b.txt", "another")
    before = opened(root)
    assert opened(root).fingerprint == before.fingerprint
    (root / "b.txt").write_text("ANOTHER")
    with pytest.raises(DataError, match=r"b\.txt has been written to"):
        before.train.documents.read(1, 0, 5)
    assert opened(root).fingerprint != before.fingerprint
    (root / "b.txt").write_text("another")  # as before, at another time: a copy
    assert opened(root).fingerprint == before.fingerprint


def test_what_was_read_is_not_read_again(tmp_path, monkeypatch):
    put(tmp_path / "text/a.txt")
    put(tmp_path / "text/b.txt")
    opened(tmp_path / "text")
    seen = []
    monkeypatch.setattr("ringattn.data.contents.read", lambda path: seen.append(path.name) or real(
        path))  # fmt: skip
    real = read
    opened(tmp_path / "text")
    assert seen == []
    put(tmp_path / "text/b.txt", "TEXT")
    opened(tmp_path / "text")
    assert seen == ["b.txt"]
    for damage in ("{", "[]", '{"a.txt": 5}'):
        (file,) = (tmp_path / "text.cache").glob("contents-*.json")
        file.write_text(damage)
        assert opened(tmp_path / "text").fingerprint


def test_bytes_that_are_no_text_are_counted_and_limited(tmp_path):
    root = tmp_path / "text"
    put(root / "a.txt")
    (root / "b.txt").write_bytes(b"one\ntwo\n\xff")
    (root / "c.txt").write_bytes(b"one \xe2\x82")  # cut within a character
    remark = opened(root).remarks[0]
    assert "1 documents, 5 tokens (bytes), 2 corrupt records left out" in remark
    assert "b.txt:3: not UTF-8" in remark
    with pytest.raises(DataError, match=r"c\.txt:1: not UTF-8.*record 2 \(data\.max_corrupt=1\)"):
        opened(root, "data.max_corrupt=1")
    (root / "a.txt").unlink()
    with pytest.raises(DataError, match="no text"):
        opened(root)


def test_a_cache_that_cannot_be_written_is_gone_without(tmp_path):
    put(tmp_path / "text/a.txt")
    want = opened(tmp_path / "text").fingerprint
    (tmp_path / "file").touch()
    for where in ("/proc/nowhere", f"{tmp_path}/file"):
        assert opened(tmp_path / "text", f"data.cache={where}").fingerprint == want


def test_a_character_may_straddle_blocks(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * (BLOCK - 1) + "é".encode() + b"\n" * 5)
    assert not read(path).problem
    path.write_bytes(b"\n" * (BLOCK - 1) + b"\xc3" + b"\n")
    assert read(path).problem.startswith(f"{BLOCK}: ")


def test_files_of_any_name_are_remembered(tmp_path):
    odd = os.fsdecode(b"\xff.txt")
    put(tmp_path / "t" / odd)
    for _ in range(2):
        ((content,), _) = contents(tmp_path / "t", [odd], tmp_path / "c", lambda *_: None)
        assert len(content.sha256) == 64


def test_what_is_lost_of_a_file_is_said(tmp_path):
    lines = [json.dumps({"text": os.urandom(40).hex()}) + "\n" for _ in range(3000)]
    whole = gzip.compress("".join(lines).encode())

    def lost(name, content):
        (tmp_path / name).write_bytes(content)
        source = Source.open(str(tmp_path), name)
        found = [x for part in source.parts for x in source.texts(part)]
        *_, corrupt = [x for x in found if isinstance(x, Corrupt)]
        return corrupt, sum(isinstance(x, str) for x in found)

    cut, read_lines = lost("cut.jsonl.gz", whole[: len(whole) // 2])
    assert 1000 < read_lines == cut.records and "ends in the middle" in cut.reason
    third = [gzip.compress("".join(lines[i : i + 1000]).encode()) for i in (0, 1000, 2000)]
    broken, read_lines = lost("broken.jsonl.gz", third[0] + b"xx" + third[1][2:] + third[2])
    assert read_lines == 1000 and 1500 < broken.records <= 2000, broken
    table = pa.table({"text": [os.urandom(40).hex() for _ in range(300)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100, compression="gzip")
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    at = len(content) // 2
    content[at : at + 200] = bytes(200)
    group, good = lost("b.parquet", bytes(content))
    assert (group.records, good) == (100, 200) and "100 of 300 rows" in group.reason
    footer, _ = lost("c.parquet", bytes(content[:-20]))
    assert footer.records == len(content[:-20]) // 1000 and "the whole file" in footer.reason
    source = Source.open(str(tmp_path), "b.parquet")
    with pytest.raises(DataError, match=r"about corrupt records 1 to 100 \(data\.max_corrupt=99"):
        shards.write(source, tmp_path / "out", max_corrupt=99)
    assert shards.write(source, tmp_path / "out", max_corrupt=100).about["corrupt"] == 100
