"""The parts of the training room that need no process group."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from ringattn.comm import Stopwatch, Timed
from ringattn.cost.model import step_flops
from ringattn.training import batch, loop, settings
from ringattn.training.checkpoint import set_aside


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=6),
    st.none() | st.integers(1, 8),
    st.integers(0, 5),
)
def test_mask_of_window_and_sinks_in_every_document(lengths, window, sinks):
    config = OmegaConf.create({"attention": {"window": window, "sinks": sinks}})
    mask = batch.build_mask(config, lengths)
    document = np.repeat(np.arange(len(lengths)), lengths)
    within = np.concatenate([np.arange(length) for length in lengths])
    q, k = np.arange(sum(lengths))[:, None], np.arange(sum(lengths))[None, :]
    want = (document[:, None] == document[None, :]) & (k <= q)
    if window:
        want &= (q - k < window) | (within[None, :] < sinks)
    assert (mask.to_dense() == want).all() and mask.area == want.sum()


def test_learning_rate_warms_up_and_falls_to_its_share():
    config = settings.load(["optim.lr=2", "optim.min_lr_ratio=0.25", "optim.warmup_tokens=100"])
    rates = [loop.learning_rate(config, tokens, 1000) for tokens in (0, 49, 100, 550, 1000, 2000)]
    assert rates == pytest.approx([0.02, 1.0, 2.0, 1.25, 0.5, 0.5])


def test_flops_follow_the_mask():
    config = batch.ModelConfig(
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
