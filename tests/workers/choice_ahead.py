"""The work lists of a choice, one head at a time, in bf16 for sm_90: compiled as the block kernels
are launched for it."""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ringattn.kernels import Scores
from ringattn.kernels.report import TARGETS, compiled
from ringattn.kernels.triton import calls

import ringattn as ra
from ringattn.planning.routing import ChoicePlan

blocks = ra.make_blocks(ra.masks.causal(4096), ra.layouts.zigzag(4096, 2), 256)
counts = np.random.default_rng(0).integers(0, 200, (2, 4, len(blocks))).astype(np.int32)
own = ChoicePlan(blocks, counts).rank(0)
rows, keys, bands = int(counts[0].sum()), own.blocks[0], own.steps[0].bands
assert len(bands) > 4
q, g = (torch.randn(1, rows, 1, 64, device="meta").bfloat16() for _ in range(2))
k, v = (torch.randn(1, keys, 1, 64, device="meta").bfloat16() for _ in range(2))
lse = torch.zeros(1, 1, rows, device="meta")
out, scores = torch.zeros_like(q, dtype=torch.float32), Scores(0.125)
dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
given = ("sm_90", g, q, k, v, lse, lse, bands)
done = [
    compiled(call, TARGETS["sm_90"][0])
    for call in (
        calls.forward("sm_90", q, k, v, bands, None, out, lse, scores, None),
        calls.backward_keys(*given, dk, dv, scores, False, None),
        calls.backward_queries(*given, dq, scores, False, None),
    )
    if call.grid
]
assert all("wgmma" in kernel.asm["ptx"] for kernel in done)
print(f"compiled {len(done)}")
