"""Corpus and stream: every rank's tokens against the whole sequence, read the plain way."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ringattn as ra
from ringattn.batches import IGNORED
from ringattn.data.corpus import END, Corpus, DataError
from ringattn.data.stream import Stream


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    for i, size in enumerate([5, 1, 40, 23, 0, 7]):
        (root / f"{i}.txt").write_bytes(bytes((i * 31 + j) % 256 for j in range(size)))
    return Corpus.open(str(root), "*.txt")


def plain(corpus, seed, epochs):
    """The endless stream and its labels, written out."""
    tokens, labels = [], []
    for epoch in range(epochs):
        for doc in np.random.default_rng([seed, epoch]).permutation(len(corpus.names)):
            text = [*(corpus.root / corpus.names[doc]).read_bytes(), END]
            tokens += text
            labels += [*text[1:], IGNORED]
    return np.array(tokens), np.array(labels)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 50),
    st.integers(0, 6),
    st.integers(1, 5),
    st.sampled_from([*ra.layouts.BUILDERS]),
)
def test_every_rank_reads_its_own_part(corpus, seq_len, first, world, name):
    stream = Stream(corpus, seq_len, seed=1)
    spans = stream.batch_spans([first, first + 1])
    layout = ra.layouts.BUILDERS[name](2 * seq_len, world)
    parts = [stream.local(spans, layout, rank) for rank in range(world)]
    tokens, labels = plain(corpus, 1, 9)
    window = np.concatenate([stream.offset(i) + np.arange(seq_len) for i in (first, first + 1)])
    assert (layout.unshard([p.tokens for p in parts], 0) == tokens[window]).all()
    assert (layout.unshard([p.labels for p in parts], 0) == labels[window]).all()


def test_a_rank_holds_only_its_own_tokens(tmp_path, monkeypatch):
    (tmp_path / "long.txt").write_bytes(bytes(4000))
    whole = Corpus.open(str(tmp_path), "*.txt")
    stream = Stream(whole, 4000, seed=0)
    read, real = [], Corpus.read

    def counting(*arguments):
        read.append(len(tokens := real(*arguments)))
        return tokens

    monkeypatch.setattr(Corpus, "read", counting)
    for name, make in ra.layouts.BUILDERS.items():
        layout = make(4000, 4)
        for rank in range(4):
            read.clear()
            stream.local(stream.spans(0), layout, rank)
            assert sum(read) <= 2 * layout.count(rank) + 2, (name, rank)  # tokens and labels


def test_digest_follows_the_text(tmp_path):
    (tmp_path / "a.txt").write_text("one text")
    stream = Stream(Corpus.open(str(tmp_path), "*"), 5, seed=0)
    before = stream.digest([0]), stream.digest([1])
    (tmp_path / "a.txt").write_text("xxx xxxx")  # as long as before
    after = stream.digest([0]), stream.digest([1])
    assert len({*before, *after}) == 4


def test_an_epoch_has_every_token_once_and_another_order(corpus):
    stream = Stream(corpus, int(corpus.lengths.sum()), seed=0)
    orders = [[span.document for span in stream.spans(epoch)] for epoch in range(4)]
    assert all(sorted(order) == list(range(5)) for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    short = Stream(corpus, 10, seed=0)
    offsets = sorted(short.offset(i) for i in range(short.rows))
    assert offsets == [10 * row for row in range(short.rows)]


def test_default_corpus_is_the_standard_library():
    corpus = Corpus.open(None, "**/*.py")
    assert len(corpus.names) > 300 and sum(corpus.sizes) > 5_000_000
    assert not any("site-packages" in name for name in corpus.names)


def test_bad_corpora_are_named(tmp_path):
    with pytest.raises(DataError, match=r"data\.root.*not a directory"):
        Corpus.open(str(tmp_path / "missing"), "*")
    with pytest.raises(DataError, match=r"data\.glob"):
        Corpus.open(str(tmp_path), "*.txt")
    (tmp_path / "gone.txt").write_text("hello")
    corpus = Corpus.open(str(tmp_path), "*.txt")
    (tmp_path / "gone.txt").write_text("h")
    with pytest.raises(DataError, match="shorter"):
        corpus.read(0, 0, 5)
