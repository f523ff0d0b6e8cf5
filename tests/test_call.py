"""Calls kept with a plan: each launch gets its own tensors, and what it counts on holds."""

import itertools

import pytest
import torch
from ringattn.kernels import Scores, call, triton

import ringattn as ra
from ringattn.planning.slices import Bands

from . import oracle
from .test_attention import inputs
from .test_gluon import emulated, gluon  # noqa: F401 - a fixture, for the Gluon kernels
from .test_triton import bands_of

MASK = ra.masks.causal(40)
MODULES = {"triton": triton, "gluon": gluon}


@pytest.fixture
def made(monkeypatch):
    """The kept calls that were put together, in their order."""
    calls, kept = [], call._Kept

    def counting(*given):
        calls.append(kept(*given))
        return calls[-1]

    monkeypatch.setattr(call, "_Kept", counting)
    return calls


def bands():
    """As a plan holds them, which keeps what is derived."""
    return Bands(bands_of(MASK))


def attend(module, bands, q, k, v, dout, add=0, softcap=0.0):
    """[out, dq, dk, dv]; with ``add`` each grows from 1."""
    scores = Scores(q.shape[-1] ** -0.5, softcap)
    out, lse = torch.full_like(dout, torch.nan), torch.full((len(q), 2, 40), -torch.inf)
    module.forward(q, k, v, bands, None, out, lse, scores)
    prepared = module.prepare(dout, out, lse)
    grads = [torch.full(x.shape, float(add) if add else torch.nan) for x in (q, k, v)]
    module.backward(dout, q, k, v, prepared, bands, *grads, scores, add > 0, add > 0)
    dq, dk, dv = grads
    return [out, (dq - add) * scores.sm_scale, dk - add, dv - add]


def right(got, q, k, v, dout, softcap=0.0):
    want = oracle.attention(q, k, v, MASK.to_dense(), dout, softcap=softcap)
    return max(oracle.error(a, b) for a, b in zip(got, want, strict=True)) <= 1e-2


def drawn(seed, batch=1, kv_heads=2):
    torch.manual_seed(seed)
    shapes = (2, kv_heads, kv_heads, 2)
    return [torch.randn(batch, 40, heads, 64).half() for heads in shapes]


@pytest.mark.parametrize("name", MODULES)
def test_what_a_call_is_kept_for(name, made):
    """Other tensors of the same form: the same call. Another form, scale or start: another one.
    All of them right, and none holds on to a tensor."""
    kept, module, counts = bands(), MODULES[name], []
    wide = [torch.empty(1, 40, 4, 64).half() for _ in range(4)]
    variants = [
        {},
        {},
        {"add": 1},
        {"softcap": 3.0},
        {"tensors": drawn(4, batch=2)},
        {"tensors": drawn(5, kv_heads=1)},
        {"tensors": [y[:, :, ::2].copy_(x) for x, y in zip(drawn(6), wide, strict=True)]},
        {},
    ]
    for seed, variant in enumerate(variants):
        tensors = variant.pop("tensors", None) or drawn(seed)
        before = len(made)
        assert right(
            attend(module, kept, *tensors, **variant),
            *tensors,
            softcap=variant.get("softcap", 0.0),
        )
        counts.append(len([c for c in made[before:] if c.kernel is not triton.bwd.prepare]))
    backward = 1 if name == "gluon" else 2
    assert counts[0] == 1 + backward and counts[1] == counts[-1] == 0
    assert counts[2] == backward  # the forward of "add" is that of the first
    assert all(counts[3:-1])
    for each in made:
        tables = each.tables.parts if each.tables else []
        held = [x for x in each.arguments if isinstance(x, torch.Tensor) and x.numel()]
        assert all(any(x is part for part in tables) for x in held)
        assert all(descriptor.base is None for descriptor, _ in each.described)


@pytest.mark.parametrize("name", MODULES)
def test_one_tensor_as_two_arguments(name):
    """Kept for q that is k, the call would else read k where another one's q is."""
    kept, module = bands(), MODULES[name]
    x, y, z, dout = drawn(0)
    for q, k, v in itertools.product((x, y), (x, y), (x, z)):
        assert right(attend(module, kept, q, k, v, dout), q, k, v, dout)


@pytest.mark.parametrize("name", MODULES)
def test_running_states_in_place_and_beside(name):
    """A step that writes its state over the one before, and one that does not."""
    kept, module = bands(), MODULES[name]
    q, k, v, dout = drawn(0)
    for in_place in (True, False, True):
        partial, lse = torch.randn(1, 40, 2, 64), torch.zeros(1, 2, 40)
        out = partial if in_place else torch.full_like(partial, torch.nan)
        before = partial.clone()
        module.forward(q, k, v, kept, partial, out, lse, Scores(64**-0.5))
        # The log-sum-exp of the step before, 0, is that of a sink; its output is not.
        want = oracle.attention(q, k, v, MASK.to_dense(), dout, sinks=torch.zeros(2))[0]
        want += torch.exp(-lse.double()).transpose(1, 2)[..., None] * before
        assert oracle.error(out, want) <= 3e-3


def test_the_same_bits_as_without_a_plan():
    """A list keeps nothing."""
    tensors = inputs(40, 2, 1, 64, batch=1, dtype=torch.float16)
    kept = bands()
    for module in MODULES.values():
        first, again, without = (
            attend(module, some, *tensors) for some in (kept, kept, list(kept))
        )
        for a, b, c in zip(first, again, without, strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)
