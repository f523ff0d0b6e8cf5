"""The parts of the training room that need no process group."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ringattn as ra
from ringattn.cost.model import step_flops
from ringattn.execution.carriers import Stopwatch, Timed
from ringattn.models.sizes import ModelConfig
from ringattn.training.attention import Attention
from ringattn.training.checkpoints.saver import set_aside
from ringattn.training.optimizer import Optimizer, Schedule


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=6),
    st.none() | st.integers(1, 8),
    st.integers(0, 5),
)
def test_mask_of_window_and_sinks_in_every_document(lengths, window, sinks):
    mask = Attention(window=window, sinks=sinks).build(lengths, sum(lengths))
    if window:
        text = f"documents & sliding_window({window}) | sinks({sinks})"
        same = Attention(mask=text).build(lengths, sum(lengths))
        assert (same.to_dense() == mask.to_dense()).all()
    document = np.repeat(np.arange(len(lengths)), lengths)
    within = np.concatenate([np.arange(length) for length in lengths])
    q, k = np.arange(sum(lengths))[:, None], np.arange(sum(lengths))[None, :]
    want = (document[:, None] == document[None, :]) & (k <= q)
    if window:
        want &= (q - k < window) | (within[None, :] < sinks)
    assert (mask.to_dense() == want).all() and mask.area == want.sum()


def test_a_mask_of_sequences_knows_their_documents():
    """Each sequence sees itself only; "documents" are those in it, sinks its first tokens."""
    mask = Attention(name="causal", mask="documents | sinks(1)").build([3, 5, 8], 8)
    one = ra.masks.documents([3, 5]) | ra.masks.sinks(8, 1)
    two = ra.masks.causal(8)
    want = np.zeros((16, 16), bool)
    want[:8, :8], want[8:, 8:] = one.to_dense(), two.to_dense()
    assert (mask.to_dense() == want).all()
    with pytest.raises(ValueError, match=r"attention\.mask='block_local\(0\)'"):
        Attention(mask="block_local(0)").check(8)


def test_learning_rate_warms_up_and_falls_to_its_share():
    keys = Optimizer(lr=2, min_lr_ratio=0.25, warmup_tokens=100)
    rates = [Schedule.of(keys, 1000).rate(tokens) for tokens in (0, 49, 100, 550, 1000, 2000)]
    assert rates == pytest.approx([0.02, 1.0, 2.0, 1.25, 0.5, 0.5])


def test_flops_follow_the_mask():
    config = ModelConfig(
        dim=8, layers=3, heads=2, kv_heads=1, head_dim=4, ffn_dim=16, vocab_size=10
    )
    # q and o: 8 x 8, k and v: 8 x 4, three of 8 x 16, the head 8 x 10
    matmuls = 3 * (2 * 64 + 2 * 32 + 3 * 128) + 80
    assert config.matmul_parameters == matmuls
    assert step_flops(config, 7, 5) == 6 * matmuls * 7 + 12 * 5 * 3 * 2 * 4


def test_what_is_set_aside_never_meets_what_was(tmp_path):
    (tmp_path / "superseded_2").mkdir()
    (tmp_path / "superseded_2/metrics.jsonl").write_text("old")
    (tmp_path / "metrics.jsonl").write_text("new")
    assert set_aside(tmp_path, None) == tmp_path / "superseded_3"
    assert (tmp_path / "superseded_3/metrics.jsonl").read_text() == "new"
    assert set_aside(tmp_path, None) is None


def test_waiting_for_an_exchange_is_timed_and_forgotten_once_read():
    class Late:
        rank, world = 0, 2

        def start(self, sends, recvs, label):
            return self

        def wait(self):
            time.sleep(0.05)

    watch = Stopwatch(torch.device("cpu"))
    timed = Timed(Late(), watch)
    pending = timed.start([], [], "x")
    watch.read()
    pending.wait()
    timed.start([], [], "y").wait()
    with watch.section("data"):
        time.sleep(0.01)
    spent = watch.read()
    assert spent["exchange"] >= 0.1 and spent["data"] >= 0.01 and watch.read() == {}
