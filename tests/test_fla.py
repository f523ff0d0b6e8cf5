"""flash-linear-attention's kernels below our mixers, in Triton's interpreter."""

import sys
from importlib.metadata import PackageNotFoundError
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import ringattn as ra
from ringattn.mixers import delta, fla, linear

from .processes import ROOT, Launch
from .test_mixers import _recurrent, both


def test_kernels_on_two_ranks_are_the_recurrence(monkeypatch):
    """Two processes of their own: Triton has to be imported with the interpreter on."""
    if not Path(sys.prefix, "fla/fla").exists():
        pytest.skip("make setup installs flash-linear-attention")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with Launch(2, ROOT / "tests/workers/fla_kernels.py") as running:
        status, output = running.finish()
    assert status == 0, output


def one_by_one(rule, vectors):
    """A kernel with fla's signature, token by token."""

    def kernel(q, k, v, g, beta=None, *, scale, initial_state, output_final_state, cu_seqlens):
        outs, lasts, ends = [], [], cu_seqlens.tolist()
        for start, (begin, end) in zip(initial_state, pairwise(ends), strict=True):
            state = start
            for t in range(begin, end):
                decay = g[0, t].exp()
                state = (decay[:, :, None] if vectors else decay[:, None, None]) * state
                new = v[0, t]
                if rule:
                    new = beta[0, t, :, None] * (new - torch.einsum("hkv,hk->hv", state, k[0, t]))
                state = state + k[0, t, :, :, None] * new[:, None]
                outs.append(scale * torch.einsum("hkv,hk->hv", state, q[0, t]))
            lasts.append(state)
        return torch.stack(outs)[None], torch.stack(lasts)

    return kernel


BY_KERNEL = {
    f"{mixer.__name__} {decay}": _recurrent(mixer, decay, None)
    for mixer in (linear, delta)
    for decay in ("none", "heads", "scalar", "vector")
}


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(fla, "runs", lambda *_: True)
    monkeypatch.setattr(fla, "prove", lambda *_: None)
    monkeypatch.setattr(fla, "_function", one_by_one)


@pytest.mark.parametrize("name", BY_KERNEL)
@pytest.mark.parametrize(
    ("kind", "world", "way"),
    [
        ("contiguous", 3, "direct"),
        ("contiguous", 5, "doubling"),
        ("zigzag", 3, "contiguous direct"),
        ("balanced", 4, None),
    ],
)
@pytest.mark.parametrize("lengths", [[24], [3, 15, 6]])
def test_what_is_built_of_kernels_is_the_recurrence(name, kind, world, way, lengths, kernels):
    """A batch of two, first states, documents and segments that a state goes through."""
    make, mask = getattr(ra.layouts, kind), ra.masks.documents(lengths)
    layout = make(mask if kind == "balanced" else mask.n_q, world)
    errors, _ = both(BY_KERNEL[name], layout, lengths, way=way)
    assert max(errors.values()) < 1e-5, errors


def test_kernels_are_proved_before_they_are_used(monkeypatch):
    monkeypatch.setattr(fla, "_function", one_by_one)
    of = (2, 4, 3, torch.float32, torch.device("cpu"))
    for rule in (True, False):
        for vectors in (True, False):
            fla.prove.__wrapped__(rule, vectors, *of)

    def slower(rule, vectors):
        kernel = one_by_one(rule, vectors)
        return lambda *args, g, **more: kernel(*args, g=0.5 * g, **more)

    monkeypatch.setattr(fla, "_function", slower)
    with pytest.raises(RuntimeError, match="is off by"):
        fla.prove.__wrapped__(True, False, *of)


def test_another_version_is_not_used(monkeypatch):
    monkeypatch.setattr(fla, "find_spec", lambda name: object())
    monkeypatch.setattr(fla, "version", lambda name: "0.7.1")
    with pytest.warns(UserWarning, match=r"fla-core 0\.7\.1 is not used"):
        assert not fla.installed.__wrapped__()

    def none(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(fla, "version", none)
    with pytest.warns(UserWarning, match="of an unknown version is not used"):
        assert not fla.installed.__wrapped__()
    monkeypatch.setattr(fla, "version", lambda name: "0.6.3")
    assert fla.installed.__wrapped__()


def test_they_run_on_gpus_in_half_precision_alone(monkeypatch):
    monkeypatch.setattr(fla, "installed", lambda: True)
    here = torch.zeros(1, dtype=torch.bfloat16)
    assert not fla.runs(here, 64) and not fla.runs(here.float(), 64)

    class OnGpu:
        is_cuda, dtype = True, torch.bfloat16

    assert fla.runs(OnGpu, 256) and not fla.runs(OnGpu, 257)
    OnGpu.dtype = torch.float32
    assert not fla.runs(OnGpu, 64)
    OnGpu.dtype = torch.float16
    monkeypatch.setattr(fla, "installed", lambda: False)
    assert not fla.runs(OnGpu, 64)


def test_a_chunk_size_asks_for_torch(monkeypatch):
    monkeypatch.setattr(fla, "runs", lambda *_: True)
    monkeypatch.setattr(fla, "mix", lambda *_: pytest.fail("kernels were called"))
    x = torch.zeros(1, 8, 2, 4)
    segments = ra.make_segments(ra.masks.causal(8), ra.layouts.contiguous(8, 1))
    assert linear(x, x, x, segments=segments, chunk=4).shape == x.shape
