"""The decoder against itself on split sequences, and RoPE against float64."""

import math

import pytest
import torch

import ringattn as ra
from ringattn.context import IGNORED, loss_sum, shift_labels
from ringattn.execution.attention import ring_attention
from ringattn.execution.carriers import VirtualWorld
from ringattn.models.decoder import Decoder, ModelConfig
from ringattn.models.rope import rotate, rotation
from ringattn.models.rope_config import RopeConfig

SIZES = {"dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn_dim": 64}


def config(**keys):
    return ModelConfig(**{**SIZES, "vocab_size": 50, **keys})


@pytest.mark.parametrize("tied", [True, False])
def test_parameter_counts(tied):
    model = Decoder(config(tied=tied), seed=0)
    assert sum(p.numel() for p in model.parameters()) == config(tied=tied).parameters


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = Decoder(config(), seed=3).state_dict()
    torch.manual_seed(2)
    second, other = Decoder(config(), seed=3).state_dict(), Decoder(config(), seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embed_tokens.weight"], other["embed_tokens.weight"])


def test_rope_at_position_one_million():
    position, dim, theta = 1_000_000, 64, 500000.0
    rope = RopeConfig(theta=theta)
    cos, sin = rotation(torch.tensor([position]), dim, rope)
    for i in range(dim // 2):
        phase = position * theta ** (-2 * i / dim)
        assert abs(cos[0, 0, i].item() - math.cos(phase)) < 1e-6
        assert abs(sin[0, 0, i].item() - math.sin(phase)) < 1e-6
    x = torch.randn(1, 1, 2, dim)
    assert torch.allclose(rotate(x, rotation(torch.tensor([7]), dim, rope)).norm(), x.norm())


def test_loss_and_gradients_do_not_depend_on_the_split():
    lengths = [9, 1, 30, 13]
    n = sum(lengths)
    tokens = torch.randint(50, (1, n), generator=torch.Generator().manual_seed(0))
    labels = shift_labels(tokens, lengths)
    labels[0, :14] = IGNORED  # with 4 contiguous ranks, one has nothing supervised

    def run(world, make):
        plan = ra.make_plan(ra.masks.documents(lengths), make(n, world))

        def work(rank):
            model = Decoder(config(), seed=0)
            positions = torch.from_numpy(plan.layout.positions(rank.rank))
            logits = model(
                tokens[:, positions],
                positions,
                lambda q, k, v: ring_attention(q, k, v, plan, group=rank),
            )
            loss = loss_sum(logits, labels[:, positions])
            grads = torch.autograd.grad(loss, list(model.parameters()))
            return loss.item(), torch.cat([g.flatten() for g in grads])

        losses, grads = zip(*VirtualWorld(world).run(work), strict=True)
        assert all(math.isfinite(x) for x in losses)
        return sum(losses), torch.stack(grads).sum(0)

    loss, grads = run(1, ra.layouts.contiguous)
    for world in (2, 3, 4):
        for make in ra.layouts.BUILDERS.values():
            other, other_grads = run(world, make)
            assert abs(other - loss) <= 1e-5 * loss
            assert (other_grads - grads).norm() <= 1e-5 * grads.norm()


@pytest.mark.parametrize("keys", [{"kv_heads": 3}, {"layers": 0}, {"head_dim": 7}])
def test_sizes_that_do_not_fit_are_named(keys):
    with pytest.raises(ValueError, match=next(iter(keys))):
        config(**keys)
