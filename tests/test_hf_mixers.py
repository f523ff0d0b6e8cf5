"""Unchanged hybrids of transformers: layers with a state on segments, and what is gathered."""

import copy
import dataclasses
import sys
from functools import partial

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

import ringattn as ra
from ringattn.execution.carriers import VirtualWorld
from ringattn.hf import NotCovered, local_batch, make_plans, split_sequence
from ringattn.hf.describe import masks
from ringattn.mixers import recurrent
from ringattn.models.mixer_config import Mixer, ModuleMixer

from .test_hf_families import COVERED, LENGTHS, REFUSED, families, step, usual


@pytest.mark.parametrize(
    ("plans_of", "shown"),
    [
        (lambda model, mask: make_plans(model, mask, "striped", world=2), "of step 2"),
        (
            lambda model, mask: make_plans(
                model, mask - ra.masks.sinks(mask.n_q, 1), "zigzag", world=2
            ),
            "a state along the sequence, which see all",
        ),
        (
            lambda model, mask: ra.make_plan(mask, ra.layouts.striped(mask.n_q, 2)),
            "of step 2",
        ),
        (
            lambda model, mask: ra.make_plan(
                ra.masks.full(mask.n_q), ra.layouts.zigzag(mask.n_q, 2)
            ),
            "a state along the sequence, which see all",
        ),
    ],
    ids=["striped", "sparse", "plan striped", "plan both ways"],
)
@pytest.mark.parametrize("name", ["lfm2", "mamba2"])
def test_a_state_needs_segments_and_documents(name, plans_of, shown):
    with pytest.raises(ValueError, match=shown):
        step(name, plans_of)


def test_modules_have_their_own_methods_back():
    model = families.make(COVERED["qwen3-next"], "ringattn")
    plan = make_plans(model, ra.masks.causal(9), "contiguous", world=1)
    inside = [m for m in model.modules() if type(m).__name__ == "Qwen3NextGatedDeltaNet"]
    with split_sequence(model, plan):
        assert inside and all("forward" in m.__dict__ for m in inside)
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert "on_segments" not in repr(vars(sys.modules[type(inside[0]).__module__]).values())


WITH_STATES = [
    "qwen3-next", "qwen3.5", "olmo-hybrid", "kimi-linear", "bamba", "nemotron-h", "granite-hybrid",
    "zamba2", "mamba2", "jamba", "mamba", "falcon-mamba", "minimax",
]  # fmt: skip


@pytest.mark.parametrize("name", WITH_STATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_of_states_are_read_off_modules_without_memory(name, dtype, monkeypatch):
    """What a forecast counts is what travels: a summary's state and transition."""
    texts, _ = masks(COVERED[name].config())
    mixers = [ModuleMixer(**text) for text in texts.values() if isinstance(text, dict)]
    heard = []
    for room in (recurrent, sys.modules["ringattn.mixers.scan"]):

        def exchange(segments, sizes, original=room.exchange_of):
            heard.append(sizes)
            return original(segments, sizes)

        monkeypatch.setattr(room, "exchange_of", exchange)
    model = families.make(COVERED[name], "ringattn").to(dtype)
    plans = make_plans(model, ra.masks.causal(9), "contiguous", world=1)
    heard.clear()
    batch = local_batch(plans, 0, torch.arange(9)[None])
    with split_sequence(model, plans, check=False), torch.no_grad():
        model(**batch)
    assert set(heard) == {mixer.state_bytes(dtype.itemsize) for mixer in mixers}


def test_sizes_of_a_convolution_are_read_off_its_module():
    texts, _ = masks(COVERED["lfm2"].config())
    mixer = Mixer(**texts["conv"])
    assert (mixer.mixer, mixer.channels, mixer.conv) == ("conv", 32, 3)
    assert mixer.state_bytes(4) is None


@pytest.mark.parametrize("name", ["bamba", "mamba2"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_states_is_right_inside_and_refused_elsewhere(name, reentrant):
    """Also where no attention, which would notice, is computed again: a backward after the split,
    or inside of a later one whose documents are others."""
    family = COVERED[name]
    model = families.make(family, "ringattn")
    each = [families.whole(family, lengths) for lengths in ([20, 28], [30, 18])]
    plans = [make_plans(model, mask, "zigzag", world=2) for _, _, mask in each]

    def grads(how, again=True):
        def work(rank):
            own = copy.deepcopy(model).train()
            if again:
                kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
                apply_activation_checkpointing(
                    own,
                    checkpoint_wrapper_fn=partial(checkpoint_wrapper, checkpoint_impl=kind),
                    check_fn=lambda m: type(m).__name__ in ("BambaMixer", "Mamba2Mixer"),
                )
            return steps(own, rank, how)

        return VirtualWorld(2, 60).run(work)

    def steps(own, rank, how):
        batches = [local_batch(p, rank.rank, x) for p, (x, _, _) in zip(plans, each, strict=True)]
        with split_sequence(own, plans[0], rank):
            loss = own(**batches[0], num_items_in_batch=46).loss
            if how == "inside":
                loss.backward()
        if how == "outside":
            loss.backward()
        if how == "later":
            with split_sequence(own, plans[1], rank):
                (loss + own(**batches[1], num_items_in_batch=46).loss).backward()
        return [p.grad for p in own.parameters() if p.grad is not None]

    for plain, kept in zip(grads("inside", again=False), grads("inside"), strict=True):
        assert all(map(torch.equal, plain, kept))
    for how in ("outside", "later"):
        with pytest.raises(RuntimeError, match="computed again in a backward"):
            grads(how)
        grads(how, again=False)  # nothing is computed again


@pytest.mark.parametrize("name", ["bamba", "qwen3-next", "jamba", "lfm2", "minimax"])
def test_a_mixer_that_is_not_the_modules_is_found_by_the_proof(name, monkeypatch):
    """As a new version of transformers might be: here ours is a little off."""
    from ringattn.hf import mixers

    off = {
        "bamba": ("linear", lambda f: lambda q, k, v, d, **m: f(q, k, v, 1.1 * d, **m)),
        "minimax": ("linear", lambda f: lambda q, k, v, d, **m: f(q, k, v, 1.1 * d, **m)),
        "qwen3-next": ("delta", lambda f: lambda q, k, v, b, *a, **m: f(q, k, v, 0.9 * b, *a, **m)),
        "jamba": ("scan", lambda f: lambda x, dt, *a, **k: f(x, dt * 1.05, *a, **k)),
        "lfm2": ("conv", lambda f: lambda x, w, *a, **k: f(x, w.roll(1, -1), *a, **k)),
    }
    what, change = off[name]
    monkeypatch.setattr(mixers, what, change(getattr(mixers, what)))
    with pytest.raises(ValueError, match="differ from the same model in one process"):
        step(name, usual)


class Meeting(torch.nn.Module):
    """A layer of somebody's own, in which tokens meet: a mean over those before."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.weight = inner, torch.nn.Linear(32, 32)

    def forward(self, x, factor=1.0):
        return self.inner(x) + factor * self.weight(torch.cumsum(x, 1) / 10)


def gathering(monkeypatch, name):
    """The family with such layers where it has none that are refused; split with gathering."""
    make, split_here = families.make, ra.hf.split_sequence

    def with_layers(family, attention):
        model = make(family, attention)
        if name == "llama":
            torch.manual_seed(3)
            for layer in model.model.layers[:2]:
                layer.mlp = Meeting(layer.mlp)
        return model

    monkeypatch.setattr(families, "make", with_layers)
    monkeypatch.setattr(
        ra.hf, "split_sequence", lambda *a, **k: split_here(*a, **k, mixers="gather")
    )
    return dataclasses.replace(COVERED[name] if name == "llama" else REFUSED[name], packed=False)


@pytest.mark.parametrize("cp", [1, 2, 3])
@pytest.mark.parametrize("name", ["llama", "rwkv"])
def test_on_request_what_mixes_tokens_is_gathered(name, cp, monkeypatch):
    family = gathering(monkeypatch, name)
    want = families.in_one_process(family, LENGTHS)
    loss, grad, whose = families.errors(families.split(family, cp, LENGTHS), want)
    assert loss <= 1e-5 and grad <= 2e-4, (loss, grad, whose)


def test_a_model_that_was_gathered_is_refused_again_without(monkeypatch):
    family = gathering(monkeypatch, "llama")
    model = families.make(family, "ringattn")
    tokens, _, mask = families.whole(family, [20])
    plan = ra.make_plan(mask, ra.layouts.contiguous(20, 1))
    batch, layer = local_batch(plan, 0, tokens), model.model.layers[0].mlp
    for mixers in ("gather", "refuse", "gather"):
        with split_sequence(model, plan, mixers=mixers):
            if mixers == "gather":
                model(**batch, num_items_in_batch=19).loss.backward()
                assert "forward" in layer.__dict__
            else:
                with pytest.raises(NotCovered, match=r"mlp \(Meeting\) mixes tokens"):
                    model(**batch, num_items_in_batch=19)
        assert "forward" not in layer.__dict__
    with (
        pytest.raises(ValueError, match='"refuse" or "gather"'),
        split_sequence(model, plan, mixers="all"),
    ):
        pass
