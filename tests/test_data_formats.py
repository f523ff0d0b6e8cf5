"""Sources, tokenizers, token shards and packing: everything against the plain way."""

import gzip
import json
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringattn.cli import main as cli
from ringattn.data import records, shards
from ringattn.data import tokenizer as tokenizers
from ringattn.data.corpus import Corpus
from ringattn.data.documents import DataError, hold_out
from ringattn.data.formats import jsonl, saved
from ringattn.data.formats.ranges import Corrupt, FileRange
from ringattn.data.open_data import open_data
from ringattn.data.packing import balanced, best_fit
from ringattn.data.probes import PAIRS, Probe
from ringattn.data.records import Source
from ringattn.data.stream import EMPTY, Mixture, Stream
from ringattn.data.tokenizer import ByteTokenizer, TokenizerKeys, train_bpe
from ringattn.models.sizes import ModelConfig
from ringattn.planning.layouts import contiguous
from ringattn.training import config
from ringattn.training.attention import Attention
from ringattn.training.batch import numbers

from .processes import TINY

TEXTS = ["one", "two words", "", "drei Wörter ✓", "the ring goes round\nand round"] * 7


def make(name, **keys):
    return tokenizers.make(TokenizerKeys(str(name), **keys))


def write_jsonl(path, texts=TEXTS, field="text"):
    path.write_text("".join(json.dumps({field: t, "id": i}) + "\n" for i, t in enumerate(texts)))


def write_all(root):
    """The same texts in every format."""
    for name in ("text", "jsonl", "gz", "parquet"):
        (root / name).mkdir()
    for i, text in enumerate(TEXTS):
        (root / f"text/{i:03}.txt").write_text(text)
    write_jsonl(root / "jsonl/a.jsonl")
    write_jsonl(root / "jsonl.tmp")
    (root / "gz/a.jsonl.gz").write_bytes(gzip.compress((root / "jsonl.tmp").read_bytes()))
    table = pa.table({"id": range(len(TEXTS)), "text": TEXTS})
    pq.write_table(table, root / "parquet/a.parquet", row_group_size=4)
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(root / "dataset"))
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS})}).save_to_disk(
        str(root / "splits")
    )


def read_all(source):
    return [text for piece in source.parts for text in source.texts(piece)]


def documents(found):
    return [found.read(i, 0, int(n)).tolist() for i, n in enumerate(found.lengths)]


@pytest.mark.parametrize("workers", [1, 2])
def test_every_format_gives_the_same_documents(tmp_path, workers, monkeypatch):
    write_all(tmp_path)
    monkeypatch.setattr(records, "RANGE_BYTES", 100)  # many parts, lines across their ends
    monkeypatch.setattr(jsonl, "RANGE_BYTES", 100)
    monkeypatch.setattr(saved, "ROWS", 3)
    want = [[*text.encode(), 256] for text in TEXTS if text]
    names = ("text", "jsonl", "gz", "parquet", "dataset", "splits")
    for name in names if workers == 1 else ("jsonl",):
        source = Source.open(str(tmp_path / name), "**/*")
        assert len(source.units()) > (name == "jsonl")
        seen = []
        found = shards.write(
            source, tmp_path / f"{name}.shards", workers=workers,
            progress=lambda done, total, seen=seen: seen.append(done / total),
        )  # fmt: skip
        assert documents(found) == want, name
        assert seen == sorted(seen) and seen[-1] == 1
    # Text files as bytes need no shards.
    assert documents(Corpus.open(str(tmp_path / "text"), "**/*")) == want


@given(st.lists(st.sampled_from(["", "a", "bc", "d" * 30]), max_size=12), st.integers(1, 60))
def test_every_line_belongs_to_one_piece(tmp_path_factory, lines, size):
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    content = "\n".join(json.dumps({"text": line}) for line in lines)
    path.write_text(content)
    pieces = [
        FileRange(str(path), start, min(start + size, len(content)), size)
        for start in range(0, len(content), size)
    ]
    source = Source(path.parent, "jsonl", "text", "train", tuple(pieces))
    assert read_all(source) == lines


def test_corrupt_records_are_named_counted_and_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "RANGE_BYTES", 60)
    lines = [json.dumps({"text": "fine"})] * 6
    lines[2], lines[4] = '{"text": "cut sho', '{"title": "no text"}'
    lines.append('{"text": 5}')
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source = Source.open(str(tmp_path), "*.jsonl")
    found = shards.write(source, tmp_path / "out", max_corrupt=3)
    assert len(found.lengths) == 4 and found.about["corrupt"] == 3
    listed = (tmp_path / "out/corrupt.jsonl").read_text().splitlines()
    where = [json.loads(line)["where"] for line in listed]
    assert where == [f"{tmp_path}/a.jsonl:{n}" for n in (3, 5, 7)]
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"a\.jsonl:7: 'text' is int.*max_corrupt=2"):
            shards.write(source, tmp_path / "no", max_corrupt=2, workers=workers)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "out"]


def test_the_limit_holds_for_what_is_tokenized_already(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": 5}\n')
    keys = [*TINY, f"data.root={tmp_path}", "data.glob=*.jsonl", f"data.cache={tmp_path}/cache"]

    def opened(most):
        run = config.load([*keys, f"data.max_corrupt={most}"])
        return open_data(run.data, run.seq_len, run.seed, lambda *_: None)

    assert "1 corrupt records left out" in opened(1).remarks[0]
    with pytest.raises(DataError, match=r"data\.max_corrupt=0: 1 records .*corrupt\.jsonl"):
        opened(0)


def test_corrupt_files_of_other_formats(tmp_path):
    def first(name, content):
        (tmp_path / name).write_bytes(content)
        source = Source.open(str(tmp_path), name)
        return next(x for x in read_all(source) if type(x) is Corrupt)

    assert first("a.txt", b"one\ntwo\n\xff").where.endswith("a.txt:3")
    cut = gzip.compress(json.dumps({"text": "long" * 99}).encode())[:-9]
    assert "a.jsonl.gz:1" in first("a.jsonl.gz", cut).where
    assert "not readable" in first("a.parquet", b"PAR1 and no more").reason
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "null.parquet")
    source = Source.open(str(tmp_path), "null.parquet")
    assert next(x for x in source.texts(source.parts[0]) if x != "a").where.endswith("row 1")


def test_bad_sources_are_named(tmp_path):
    write_all(tmp_path)
    for keys, shown in (
        ({"root": str(tmp_path / "parquet"), "field": "body"}, "data.field=body.*id, text"),
        ({"root": str(tmp_path / "dataset"), "field": "body"}, "data.field=body"),
        ({"root": str(tmp_path / "splits"), "split": "test"}, "data.split=test.*train"),
        ({"root": str(tmp_path)}, "formats jsonl, parquet, text"),
        ({"root": str(tmp_path / "text"), "format": "datasets"}, "not a dataset"),
    ):
        with pytest.raises(DataError, match=shown):
            read_all(Source.open(glob="**/[!d.]*", **keys))


def test_bpe_round_trip_and_shards_remember_their_tokenizer(tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl")
    text = f"root={tmp_path} glob=*.jsonl"
    assert cli(["bpe", *text.split(), "vocab_size=280", f"out={tmp_path}/bpe.json"]) == 0
    tokenizer = make(f"{tmp_path}/bpe.json")
    assert 257 <= tokenizer.vocab_size <= 280
    assert len(tokenizer.encode("the ring goes round")) < 19
    out = tmp_path / "tokens"
    assert cli(["tokenize", *text.split(), f"tokenizer={tmp_path}/bpe.json", f"out={out}"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = shards.Shards(out)
    assert said["documents"] == len(found.lengths) == sum(map(bool, TEXTS))
    for ids, want in zip(documents(found), filter(None, TEXTS), strict=True):
        assert ids[-1] == tokenizer.end and found.tokenizer.decode(ids[:-1]) == want
    assert found.tokenizer.fingerprint == tokenizer.fingerprint
    assert cli(["tokenize", *text.split(), f"out={out}"]) == 2  # it is already there
    odd = (tmp_path / "bpe.json").read_text().replace("<|endoftext|>", "<odd>")
    (tmp_path / "bare.json").write_text(odd)
    with pytest.raises(DataError, match=r"give data\.end=TOKEN"):
        make(f"{tmp_path}/bare.json")
    assert make(f"{tmp_path}/bare.json", end="<odd>").end == tokenizer.end


def test_documents_come_whole_whatever_the_tokenizer_file_says(tmp_path):
    train_bpe(TEXTS, 300, tmp_path / "bpe.json")
    plain = make(str(tmp_path / "bpe.json")).encode("the ring goes round " * 9).tolist()
    content = json.loads((tmp_path / "bpe.json").read_text())
    content["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    (tmp_path / "short.json").write_text(json.dumps(content))
    assert make(str(tmp_path / "short.json")).encode("the ring goes round " * 9).tolist() == plain


def bpe_with(path, **changes):
    """A tokenizer.json with <|endoftext|>, <|begin|> and what else is given."""
    from tokenizers import AddedToken, Tokenizer

    train_bpe(TEXTS, 300, path)
    fast = Tokenizer.from_file(str(path))
    fast.add_special_tokens([AddedToken("<|begin|>", special=True)])
    fast.save(str(path))
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return Tokenizer.from_file(str(path)).token_to_id("<|begin|>")


def template(*around):
    """A post-processor as Llama 3's, or with tokens at the end too."""
    before, after = around if len(around) == 2 else (*around, None)
    pieces = [{"Sequence": {"id": "A", "type_id": 0}}]
    for place, token in ((0, before), (len(pieces) + 1, after)):
        if token:
            pieces.insert(place, {"SpecialToken": {"id": token[0], "type_id": 0}})
    names = {t[0]: {"id": t[0], "ids": [t[1]], "tokens": [t[0]]} for t in (before, after) if t}
    return {"post_processor": {"type": "TemplateProcessing", "single": pieces, "pair": [
        *pieces, {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": names}}  # fmt: skip


@pytest.mark.parametrize("workers", [1, 2])
def test_text_that_spells_a_control_token_stays_text_unless_asked(tmp_path, workers):
    begin = bpe_with(tmp_path / "bpe.json")
    texts = ["quoting <|endoftext|> here", "plain", "<|begin|><|endoftext|>", "<|endof text|>"]
    write_jsonl(tmp_path / "a.jsonl", texts)
    for asked in (False, True):
        keys = [*TINY, f"data.root={tmp_path}", "data.glob=*.jsonl", f"data.cache={tmp_path}/cache",
                f"data.tokenizer={tmp_path}/bpe.json", f"data.workers={workers}",
                f"data.special_tokens={str(asked).lower()}"]  # fmt: skip
        run = config.load(keys)
        opened = open_data(run.data, run.seq_len, run.seed, lambda *_: None)
        shown = "which they become" if asked else "which stay text"
        assert f"its text spells 3 control tokens, {shown}" in opened.remarks[0]
        found = opened.train.documents
        end, ids = opened.tokenizer.end, documents(opened.train.documents)
        assert [d[-1] for d in ids] == [end] * 4
        assert [d[:-1].count(end) + d.count(begin) for d in ids] == [asked, 0, asked, 0]
        if not asked:
            assert [found.tokenizer.decode(d[:-1]) for d in ids] == texts
    assert len(list((tmp_path / "cache").glob("*/tokens.json"))) == 2
    one, other = (make(tmp_path / "bpe.json", special_tokens=x) for x in (False, True))
    assert one.fingerprint != other.fingerprint


def test_documents_have_what_the_template_puts_around_them(tmp_path):
    path = tmp_path / "bpe.json"
    begin = bpe_with(path)
    assert make(path).before == []
    bpe_with(path, **template(("<|begin|>", begin)))
    text = make(path).encode("the ring").tolist()
    end = make(path).end
    assert make(path).document("the ring").tolist() == [begin, *text, end]
    assert make(path, template=False).document("the ring").tolist() == [*text, end]
    assert make(path, template=False).fingerprint != make(path).fingerprint
    # An end that the template has as well comes once.
    bpe_with(path, **template(None, ("<|endoftext|>", end)))
    assert make(path).document("the ring").tolist() == [*text, end]
    bpe_with(path, **template(("<|endoftext|>", end), ("<|begin|>", begin)))
    assert make(path).document("the ring").tolist() == [end, *text, begin, end]
    # So do a beginning and an end that a text spells, if they become what they spell.
    bpe_with(path, **template(("<|begin|>", begin)))
    spelled = "<|begin|>the ring<|endoftext|>"
    assert make(path, special_tokens=True).document(spelled).tolist() == [begin, *text, end]
    assert make(path).document(spelled).tolist().count(end) == 1
    assert len(make(path).document(spelled)) > len(text) + 2
    # What stands beside it must not say otherwise.
    bpe_with(path, **template(("<|begin|>", begin)))
    beside = tmp_path / "tokenizer_config.json"
    for says in (True, False):
        beside.write_text(json.dumps({"bos_token": "<|begin|>", "add_bos_token": says}))
        if not says:
            with pytest.raises(DataError, match=r"data\.template=true"):
                make(path)
        assert make(path, **({} if says else {"template": True})).before == [begin]
    # Shards know how they were made; made-up texts and evaluation begin alike.
    write_jsonl(tmp_path / "a.jsonl")
    source = Source.open(str(tmp_path), "*.jsonl")
    found = shards.write(source, tmp_path / "out", TokenizerKeys(str(path), template=True))
    assert found.tokenizer.before == [begin] and found.about["control_tokens"] == 0
    assert all(d[0] == begin for d in documents(found))
    probe = Probe("passkey", make(path, template=True), 200, 0)
    assert probe.tokens(probe.spans(0)[0], 0, 200, 1)[0] == begin


def test_keys_of_a_tokenizer_that_cannot_be_followed_are_refused(tmp_path):
    bpe_with(tmp_path / "bpe.json")
    write_jsonl(tmp_path / "a.jsonl")
    source = Source.open(str(tmp_path), "*.jsonl")
    shards.write(source, tmp_path / "out", TokenizerKeys(str(tmp_path / "bpe.json")))

    def opened(*keys):
        run = config.load([*TINY, f"data.cache={tmp_path}/cache", *keys])
        return open_data(run.data, run.seq_len, run.seed, lambda *_: None)

    for root in (f"data.root={tmp_path}", "data.root=" + str(tmp_path / "out")):
        made = "were made with" if root.endswith("out") else "bytes have none"
        for key in ("special_tokens=true", "template=true", "end=<|begin|>"):
            with pytest.raises(DataError, match=rf"data\.{key.split('=')[0]}=.*{made}"):
                opened(root, "data.glob=*.jsonl", f"data.{key}")
        assert opened(root, "data.glob=*.jsonl").train.rows


def test_a_tokenizer_beside_older_shards_is_used_as_they_were_made(tmp_path):
    begin = bpe_with(tmp_path / "bpe.json", **template(("<|begin|>", 300)))
    write_jsonl(tmp_path / "a.jsonl")
    old = TokenizerKeys(str(tmp_path / "bpe.json"), template=False, special_tokens=True)
    out = tmp_path / "out"
    shards.write(Source.open(str(tmp_path), "*.jsonl"), out, old)
    about = json.loads((out / "tokens.json").read_text())
    for key in ("template", "special_tokens", "fingerprint", "control_tokens"):
        del about[key]
    (out / "tokens.json").write_text(json.dumps(about))
    keys = [*TINY, f"data.root={out}", f"data.tokenizer={tmp_path}/bpe.json"]
    run = config.load(keys)
    opened = open_data(run.data, run.seq_len, run.seed, lambda *_: None)
    assert opened.tokenizer.before == [] and begin is not None
    run = config.load([*keys, "data.template=true"])
    with pytest.raises(DataError, match="of another one, or used otherwise"):
        open_data(run.data, run.seq_len, run.seed, lambda *_: None)


def test_text_that_is_no_unicode_is_corrupt(tmp_path):
    lines = ['{"text": "\\ud83d"}', "[" * 100_000, '{"text": "fine"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found = read_all(Source.open(str(tmp_path), "*"))
    assert [type(x) for x in found] == [Corrupt, Corrupt, str]
    assert [x.where.rsplit(":")[-1] for x in found[:2]] == ["1", "2"]


def test_another_packing_is_other_data():
    cut, packed = (Stream(Numbers([5, 9]), 7, 0, packing) for packing in ("cut", "best_fit"))
    assert cut.fingerprint != packed.fingerprint


def test_damaged_shards_are_named(tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    shards.write(Source.open(str(tmp_path), "*.jsonl"), tmp_path / "out")
    path = tmp_path / "out/00000.tokens"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"00000\.tokens has \d+ bytes"):
        shards.Shards(tmp_path / "out")
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        shards.Shards(tmp_path / "out")


class Numbers:
    """Documents whose tokens tell where they are from."""

    fingerprint = "numbers"

    def __init__(self, lengths):
        self.lengths = np.array(lengths, np.int64)

    def read(self, document, start, stop, step=1):
        return np.arange(start, min(stop, self.lengths[document]), step) + 1000 * (document + 1)


@pytest.mark.parametrize("pack", [best_fit, balanced])
@given(st.lists(st.integers(1, 70), min_size=1, max_size=30), st.integers(1, 40), st.integers(0, 9))
def test_every_token_is_packed_once_and_only_what_is_too_long_is_cut(pack, lengths, seq_len, seed):
    lengths = np.array(lengths)
    rows = pack(lengths, seq_len, np.random.default_rng(seed).permutation(len(lengths)))
    covered = [np.zeros(n, int) for n in lengths]
    for r in range(len(rows.first) - 1):
        pieces = slice(rows.first[r], rows.first[r + 1])
        assert 0 < rows.length[pieces].sum() <= seq_len
        for d, start, n in zip(
            rows.document[pieces], rows.start[pieces], rows.length[pieces], strict=True
        ):
            covered[d][start : start + n] += 1
            assert n == min(seq_len, lengths[d] - start)
    assert all((c == 1).all() for c in covered)
    if pack is balanced:
        return
    # No two rows could have been one, so it is never worse than twice the best.
    filled = np.add.reduceat(rows.length, rows.first[:-1])
    assert len(filled) < 2 or sorted(filled)[0] + sorted(filled)[1] > seq_len


def test_best_fit_stream_pads_and_supervises_every_token_once_an_epoch():
    found = Numbers([5, 9, 3, 30, 12, 1])
    stream = Stream(found, 13, seed=0, packing="best_fit", filler=7)
    assert 0 < stream.waste < 0.3
    for epoch in range(2):
        spans = [s for row in range(stream.rows) for s in stream.spans(epoch * stream.rows + row)]
        real = [s for s in spans if s.document != EMPTY]
        assert sum(s.length for s in real) == found.lengths.sum()
        assert sum(s.length for s in spans) == 13 * stream.rows


def test_a_mixture_has_its_shares_and_loses_no_sequence():
    streams = [Stream(Numbers([40, 30]), 10, seed=(0, i)) for i in range(3)]
    mixture = Mixture(streams, [5, 3, 0.001], seed=0)
    places = [mixture.place(n) for n in range(3 * Mixture.BLOCK + 50)]
    for source in range(3):
        numbers = [number for s, number in places if s == source]
        assert numbers == list(range(len(numbers)))  # each stream in its own order
        full = [s for s, _ in places[: 3 * Mixture.BLOCK]].count(source)
        assert abs(full - 3 * Mixture.BLOCK * mixture.shares[source]) < 2
    # A position means the same, whatever was asked for before.
    again = Mixture(streams, [5, 3, 0.001], seed=0)
    assert again.place(2500) == places[2500]
    assert {s.source for s in again.spans(2500)} == {places[2500][0]}


def test_a_task_in_a_mixture_asks_for_its_answers_only():
    """As alone; and each source's rows are those that it has by itself."""
    probe = Probe("recall", ByteTokenizer(), 97, seed=3, halvings=1)
    text = Stream(Numbers([40, 70, 300]), 97, seed=0, filler=probe.filler)
    mixture = Mixture([text, probe], [1, 1], seed=0)
    layout = contiguous(97, 1)
    for number in range(12):
        source, own = mixture.place(number)
        alone = mixture.streams[source]
        got = mixture.local(mixture.spans(number), layout, 0)
        want = alone.local(alone.spans(own), layout, 0)
        assert (got.tokens == want.tokens).all() and (got.labels == want.labels).all()
        asked = int((got.labels >= 0).sum())
        assert asked > 80 if source == 0 else asked <= 2 * PAIRS


@pytest.mark.parametrize("halvings", [0, 2, 9])
def test_rows_of_a_task_are_halved_as_often_as_is_said(halvings, tmp_path):
    """Alone and in a mixture, and no further than the task needs (passkey: above 64 bytes)."""
    (tmp_path / "a.txt").write_text("some text " * 300)
    alone = ["data=passkey"]
    mixed = [
        "data=mix",
        f"data.mix=[{{root: {tmp_path}, weight: 1}}, {{format: passkey, weight: 1}}]",
    ]
    for keys in (alone, mixed):
        run = config.load([*TINY, *keys, "seq_len=2048", f"data.halvings={halvings}"])
        train = open_data(run.data, run.seq_len, run.seed, lambda *_: None).train
        task = train if keys is alone else train.streams[1]
        lengths = {span.length for n in range(20) for span in task.spans(n)}
        assert lengths == {2048 >> i for i in range(min(halvings, 4) + 1)}


@given(st.lists(st.floats(0.001, 1), min_size=2, max_size=6))
def test_shares_of_a_mixture_never_drift(weights):
    mixture = Mixture([Stream(Numbers([9]), 3, seed=0)] * len(weights), weights, seed=0)
    for block in range(40):
        mixture.place(block * Mixture.BLOCK)
        counts = mixture._counts[block + 1]
        assert counts.sum() == (block + 1) * Mixture.BLOCK
        assert (counts >= mixture._counts[block]).all()
        assert abs(counts - mixture.shares * counts.sum()).max() < 2


def test_held_out_documents_are_never_trained_on():
    found = Numbers(range(1, 400))
    train, held = hold_out(found, 0.1)
    assert sorted([*train.chosen, *held.chosen]) == list(range(399))
    assert 20 < len(held.lengths) < 60 and train.fingerprint != held.fingerprint
    first = held.read(0, 0, 1)[0]
    assert first == 1000 * (held.chosen[0] + 1)
    with pytest.raises(DataError, match=r"eval\.holdout"):
        hold_out(Numbers([5]), 0.01)


@pytest.mark.parametrize("task", ["passkey", "recall"])
@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0, None])
def test_probes_ask_for_what_they_show(task, depth):
    tokenizer = ByteTokenizer()
    probe = Probe(task, tokenizer, 400, 0, depth)
    for number in range(5):
        (span,) = probe.spans(number)
        tokens = probe.tokens(span, 0, 400, 1)
        labels = probe.labels(span, 0, 400, 1)
        at = np.flatnonzero(labels >= 0)
        assert (labels[at] == tokens[at + 1]).all() and len(tokens) == 400
        if task == "passkey":
            text = tokenizer.decode(tokens.tolist())
            key = tokenizer.decode(labels[at].tolist())
            assert text.endswith(f"The pass key is {key}") and len(key) == 5
            assert f"The pass key is {key}. Remember it. {key} is the pass key." in text
            where = text.index("The pass key is") / 400
            assert depth is None or abs(where - 0.7 * depth) < 0.2
        else:
            question = tokens[384:].reshape(8, 2)
            start = next(i for i in range(400) if set(tokens[i : i + 16 : 2]) == {*question[:, 0]})
            pairs = dict(tokens[start : start + 16].reshape(8, 2))
            assert all(pairs[key] == value for key, value in question)
    mixed = Probe(task, tokenizer, 401, 0, depth, halvings=1)
    for number in range(4):
        spans = mixed.spans(number)
        assert [s.length for s in spans] == ([401] if number % 2 == 0 else [200, 200, 1])
        for span in spans:
            if span.document != EMPTY:
                assert len(mixed.tokens(span, 0, 9999, 1)) == span.length
                assert (mixed.labels(span, 0, 9999, 1) >= 0).sum() == (
                    5 if task == "passkey" else 8
                )
    assert Probe(task, tokenizer, 400, 1).fingerprint != probe.fingerprint
    with pytest.raises(DataError, match="takes at least"):
        Probe(task, tokenizer, 20, 0)


def test_bpe_stops_where_the_text_has_no_more(tmp_path):
    assert train_bpe(["ab ab"], 500, tmp_path / "t.json") < 500


def test_balanced_rows_are_less_unequal_and_train():
    draw = np.random.default_rng(0)
    lengths = np.clip(np.exp(draw.normal(4, 1.2, 800)).astype(int), 1, 600)
    spread = []
    for pack in (best_fit, balanced):
        rows = pack(lengths, 600, draw.permutation(len(lengths)))
        work = np.add.reduceat(rows.length.astype(float) ** 2, rows.first[:-1])
        spread.append(work.std() / work.mean())
        assert len(work) <= 1.02 * lengths.sum() / 600 + 2
    assert spread[1] < 0.9 * spread[0], spread
    stream = Stream(Numbers([5, 9, 3, 30, 12, 1]), 13, seed=0, packing="balanced")
    assert (
        sum(span.length for i in range(stream.rows) for span in stream.spans(i)) == 13 * stream.rows
    )


@pytest.mark.parametrize("balance", [True, False])
def test_the_sequences_of_a_step_are_dealt_and_stay_the_same(balance):
    stream = Stream(Numbers([40, 2, 3, 1, 39, 7, 5, 2, 20, 1]), 40, seed=1, packing="best_fit")
    model = ModelConfig(dim=8, layers=2, heads=2, kv_heads=2, head_dim=4, ffn_dim=8, vocab_size=300)
    seen, unequal = [], set()
    for rank in range(3):
        context = SimpleNamespace(dp=3, dp_rank=rank)
        each, waits = numbers(Attention(), model, stream, context, 2, 4, 24, balance)
        assert [len(own) for own in each] == [2] * 4
        seen += [number for own in each for number in own]
        unequal.add(waits)
    assert sorted(seen) == list(range(24, 48)) and len(unequal) == 1
    alone = numbers(Attention(), model, stream, SimpleNamespace(dp=1), 2, 2, 24, balance)
    assert alone == ([[24, 25], [26, 27]], 1.0)
