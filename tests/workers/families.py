"""Mixers with chosen or summarised keys on real processes, float32, beside their definitions in
float64."""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import ringattn as ra
from ringattn.execution.carriers import end_distributed
from tests.families import FAMILIES, blocks_of, inputs_of, split, whole

dist.init_process_group("gloo", timeout=timedelta(seconds=300))
rank, world = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(1)
worst = 0.0
for lengths, kind, ulysses in (
    ([35], "zigzag", 1), ([1, 20, 2, 15], "balanced", 1), ([27, 14], "contiguous", 2),
):  # fmt: skip
    layout = ra.layouts.build(kind, ra.masks.documents(lengths), world)
    for name, family in FAMILIES.items():
        inputs, d_out = inputs_of(family, layout.n, 11)
        inputs = {k: x.float().double() if x.is_floating_point() else x for k, x in inputs.items()}
        degree = ulysses if family.ulysses and world % ulysses == 0 else 1
        blocks = blocks_of(family, layout, lengths, degree)
        want, grads = whole(family, inputs, d_out, lengths)
        group = dist.group.WORLD
        out, own = split(family, inputs, d_out, blocks, rank, group, torch.float32)
        pairs = [(out, layout.shard(want, rank))]
        for key, wanted in grads.items():
            if key in family.shared:
                dist.all_reduce(own[key])
            pairs.append((own[key], wanted if key in family.shared else layout.shard(wanted, rank)))
        for got, wanted in pairs:
            error = float((got.double() - wanted).norm() / (wanted.norm() + 1))
            assert error < 1e-5, (name, kind, lengths, error)
            worst = max(worst, error)
print(f"rank {rank}: off by {worst:.1e} at most")
end_distributed()
