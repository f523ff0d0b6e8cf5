"""The step-0 self-check must see what it is there to see."""

import math

import pytest
import torch
import torch.distributed as dist

from ringattn.context import IGNORED, Context, check_engaged, loss_sum
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
        check_engaged(context, layout, "ring", model, 50)


def test_self_check_sees_attention_that_is_not_engaged(context, model):
    def own_token_only(tokens, positions, attend):
        return model(tokens, positions, lambda q, k, v: v.repeat_interleave(2, 2))

    with pytest.raises(RuntimeError, match="does not reach every later one"):
        check_engaged(context, "zigzag", "ring", own_token_only, 50)


def test_self_check_sees_a_mask_that_is_dropped(context, model):
    def always_causal(tokens, positions, attend):
        def dense(q, k, v):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            ).transpose(1, 2)

        return model(tokens, positions, dense)

    with pytest.raises(RuntimeError, match="leaks into later ones"):
        check_engaged(context, "zigzag", "ring", always_causal, 50)


def test_a_shard_without_supervised_tokens_is_zero_and_connected():
    logits = torch.randn(1, 5, 7, requires_grad=True)
    loss = loss_sum(logits, torch.full((1, 5), IGNORED))
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0 and math.isfinite(loss.item()) and (grad == 0).all()


def test_cp_must_divide_the_world(context):
    with pytest.raises(ValueError, match="must divide the world of 1"):
        Context.create(2, torch.device("cpu"))
