"""The step-0 self-check must see what it is there to see."""

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import ringattn as ra
from ringattn.context import (
    IGNORED,
    Context,
    Strategy,
    check_engaged,
    loss_sum,
    position_ids,
    shift_labels,
)
from ringattn.models.decoder import Decoder, ModelConfig


@pytest.fixture
def context(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield Context.create(1, torch.device("cpu"))
    dist.destroy_process_group()


@pytest.fixture
def model():
    sizes = {"dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn_dim": 64}
    return Decoder(ModelConfig(vocab_size=50, **sizes), seed=0)


def test_self_check_passes_for_a_model_that_uses_its_plan(context, model):
    for layout in ("zigzag", "contiguous", "striped"):
        check_engaged(context, Strategy(context.cp, layout), model, 50)


def test_self_check_sees_attention_that_is_not_engaged(context, model):
    def own_token_only(tokens, positions, attend):
        return model(tokens, positions, lambda q, k, v: v.repeat_interleave(2, 2))

    with pytest.raises(RuntimeError, match="does not reach every later one"):
        check_engaged(context, Strategy(context.cp), own_token_only, 50)


def test_self_check_sees_a_mask_that_is_dropped(context, model):
    def always_causal(tokens, positions, attend):
        def dense(q, k, v):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            ).transpose(1, 2)

        return model(tokens, positions, dense)

    with pytest.raises(RuntimeError, match="leaks into later ones"):
        check_engaged(context, Strategy(context.cp), always_causal, 50)


def test_a_shard_without_supervised_tokens_is_zero_and_connected():
    logits = torch.randn(1, 5, 7, requires_grad=True)
    loss = loss_sum(logits, torch.full((1, 5), IGNORED))
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0 and math.isfinite(loss.item()) and (grad == 0).all()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 5))
def test_positions_and_labels_follow_the_documents(lengths, world):
    n = sum(lengths)
    tokens = torch.arange(1, n + 1)[None]
    last = torch.tensor(lengths).cumsum(0) - 1
    whole = torch.cat([tokens[0, 1:], torch.tensor([IGNORED])])[:n]
    assert torch.equal(shift_labels(tokens)[0], whole)
    whole[last[last >= 0]] = IGNORED
    assert torch.equal(shift_labels(tokens, lengths)[0], whole)
    each = torch.cat([torch.arange(length) for length in lengths])
    for make in ra.layouts.BUILDERS.values():
        layout = make(n, world)
        for given_lengths, want in ((None, torch.arange(n)), (lengths, each)):
            parts = [position_ids(layout, rank, given_lengths) for rank in range(world)]
            assert torch.equal(layout.unshard(parts, 0), want)


def test_lengths_must_add_up():
    with pytest.raises(ValueError, match="documents of 5 tokens in a sequence of 6"):
        position_ids(ra.layouts.zigzag(6, 2), 0, [2, 3])
    with pytest.raises(ValueError, match="documents of 5 tokens in a sequence of 6"):
        shift_labels(torch.zeros(1, 6, dtype=torch.long), [2, 3])


def test_cp_must_divide_the_world(context):
    with pytest.raises(ValueError, match="must divide the world of 1"):
        Context.create(2, torch.device("cpu"))
