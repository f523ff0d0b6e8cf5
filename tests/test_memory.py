"""The loss in chunks, and what blocks keep: equal results, and attention computed once."""

import importlib.util
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import ringattn as ra
from ringattn.batches import IGNORED
from ringattn.execution.attention import ring_attention
from ringattn.execution.carriers import VirtualWorld
from ringattn.models.decoder import Decoder, ModelConfig
from ringattn.models.loss import LEAST, chunked_cross_entropy, liger_cross_entropy
from ringattn.models.memory import Memory

from .processes import ROOT

spec = importlib.util.spec_from_file_location(
    "training_memory", ROOT / "benchmarks/training_memory.py"
)
training_memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(training_memory)

ATTENTION = {torch.ops.ringattn.attention.default, torch.ops.ringattn.attention_backward.default}


def naive(hidden, weight, labels):
    logits = hidden.double() @ weight.double().T
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(labels.shape)


@given(
    st.integers(1, 40),
    st.integers(1, 30),
    st.integers(1, 9),
    st.none() | st.integers(1, 50),
    st.integers(0, 2**31),
)
def test_loss_and_its_gradients(tokens, vocab, dim, chunk, seed):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, tokens, dim, generator=draw).requires_grad_()
    weight = (3 * torch.randn(vocab, dim, generator=draw)).requires_grad_()
    labels = torch.randint(vocab, (1, tokens), generator=draw)
    labels[torch.rand(1, tokens, generator=draw) < 0.3] = IGNORED
    total, each, _ = chunked_cross_entropy(hidden, weight, labels, chunk)
    want = naive(hidden, weight, labels)
    assert torch.allclose(each.double(), want, atol=1e-4) and not each.requires_grad
    assert abs(total - want.sum()) <= 1e-4 * (1 + want.sum())
    got = torch.autograd.grad(2 * total, (hidden, weight))
    for a, b in zip(got, torch.autograd.grad(2 * want.sum(), (hidden, weight)), strict=True):
        assert torch.allclose(a, b.float(), atol=1e-4)
    frozen, *_ = chunked_cross_entropy(hidden, weight.detach(), labels, chunk)
    assert torch.equal(torch.autograd.grad(2 * frozen, hidden)[0], got[0])


def test_liger_gives_the_same_loss():
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 20, 16, generator=draw).requires_grad_()
    weight = torch.randn(30, 16, generator=draw).requires_grad_()
    labels = torch.randint(30, (1, 20), generator=draw)
    labels[0, 3] = IGNORED
    want, got = naive(hidden, weight, labels).sum(), liger_cross_entropy(hidden, weight, labels)
    assert abs(got - want) <= 1e-4 * want
    pairs = (torch.autograd.grad(loss, (hidden, weight)) for loss in (want, got))
    for a, b in zip(*pairs, strict=True):
        assert torch.allclose(a.float(), b, atol=1e-4)


def test_the_loss_has_one_backward():
    hidden = torch.randn(1, 5, 4, requires_grad=True)
    labels = torch.zeros(1, 5, dtype=torch.long)
    total, *_ = chunked_cross_entropy(hidden, torch.randn(9, 4), labels)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        total.backward()


def test_bf16_loss_is_float32_and_its_weight_gradient_is_summed_in_float32():
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 4096, 16, generator=draw).bfloat16()
    weight = torch.randn(9, 16, generator=draw).bfloat16().requires_grad_()
    labels = torch.randint(9, (1, 4096), generator=draw)
    total, each, _ = chunked_cross_entropy(hidden, weight, labels, 8)
    want = naive(hidden, weight, labels).sum()
    assert each.dtype == total.dtype == torch.float32
    assert abs(total - want) <= 2e-3 * want
    (got,) = torch.autograd.grad(total, weight)
    (exact,) = torch.autograd.grad(want, weight)
    # Summed in bf16 over 512 chunks it would be off by several per cent.
    assert (got.float() - exact).norm() <= 5e-3 * exact.norm()


class Count(TorchDispatchMode):
    """Calls of attention, forward and backward."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in ATTENTION:
            self.calls.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "memory",
    [
        Memory(checkpoint=True),
        Memory(checkpoint=True, offload=True, ffn_tile=5, loss_chunk=7),
        Memory(ffn_tile=4),
    ],
    ids=["checkpoint", "all", "tiles"],
)
def test_same_gradients_and_attention_runs_once(memory):
    config = ModelConfig(
        dim=32, layers=3, heads=4, kv_heads=2, head_dim=8, ffn_dim=64, vocab_size=50
    )
    n = 37
    plan = ra.make_plan(ra.masks.causal(n), ra.layouts.zigzag(n, 2))
    tokens = torch.randint(50, (1, n + 1), generator=torch.Generator().manual_seed(0))

    def run(memory):
        def work(rank):
            model = Decoder(config, 0, memory)
            own = torch.from_numpy(plan.layout.positions(rank.rank))

            def attend(q, k, v):
                return ring_attention(q, k, v, plan, group=rank)

            with Count() as count:
                loss, *_ = model(tokens[:, own], own, attend, tokens[:, own + 1])
                loss.backward()
            # 3 forwards, 3 backwards, and no third time.
            assert len(count.calls) == 2 * config.layers
            return loss.detach(), [p.grad for p in model.parameters()]

        return VirtualWorld(2).run(work)

    for (loss, grads), (other, others) in zip(run(Memory()), run(memory), strict=True):
        assert torch.equal(loss, other)
        for a, b in zip(grads, others, strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_offload_needs_checkpoint():
    with pytest.raises(ValueError, match=r"memory\.offload"):
        Memory(offload=True)


def test_logits_of_all_tokens_never_exist():
    """The peak of a step does not move with vocabulary beyond the head's own weights."""

    def peak(vocab):
        sizes = {"dim": 32, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 16, "ffn_dim": 64}
        model = Decoder(ModelConfig(**sizes, vocab_size=vocab), 0, Memory(checkpoint=True))
        n = 4096
        plan = ra.make_plan(ra.masks.block_local(n, 64), ra.layouts.contiguous(n, 1))
        tokens = torch.arange(n)[None] % 200
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            loss, *_ = model(
                tokens, tokens[0], lambda q, k, v: ra.ring_attention(q, k, v, plan), tokens
            )
            loss.backward()
        events = record.profiler.kineto_results.events()
        moves = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        return max(accumulate(size for _, size in moves))

    small, large = peak(256), peak(16384)
    head = (16384 - 256) * 32 * 4
    # The head's gradient and the one in the making, and one chunk of logits.
    assert large - small <= 2 * head + 4 * LEAST * 16384  # all logits are 128 heads


def test_the_written_model_of_memory():
    """Two lengths of benchmarks/training_memory.py, which has the whole table."""
    slopes, forwards = {}, {}
    for name, more in (("plain", ()), ("long", ("memory=long", "memory.ffn_tile=256"))):
        found = [
            training_memory.run(
                [f"seq_len={n}", "model.dim=64", "model.layers=8", "model.heads=4",
                 "model.kv_heads=2", "model.head_dim=16", "model.ffn_dim=176",
                 "model.vocab_size=512", *more]
            )
            for n in (1024, 3072)
        ]  # fmt: skip
        slopes[name] = [found[1][key] - found[0][key] for key in ("peak", "predicted")]
        forwards[name] = found[0]["forwards"], found[0]["backwards"]
    for measured, written in slopes.values():
        assert written / 1.3 <= measured <= 1.3 * written
    assert forwards["plain"] == forwards["long"] == (8, 8)
    assert slopes["long"][0] < 0.4 * slopes["plain"][0]
