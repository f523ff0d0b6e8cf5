"""flash-linear-attention's kernels below our mixers, in Triton's interpreter."""

import sys
from pathlib import Path

import pytest
import torch

import ringattn as ra
from ringattn.mixers import fla, linear

from .processes import ROOT, Launch


def test_kernels_on_two_ranks_are_the_recurrence(monkeypatch):
    """Two processes of their own: Triton has to be imported with the interpreter on."""
    if not Path(sys.prefix, "fla/fla").exists():
        pytest.skip("make setup installs flash-linear-attention")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with Launch(2, ROOT / "tests/workers/fla_kernels.py") as running:
        status, output = running.finish()
    assert status == 0, output


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
