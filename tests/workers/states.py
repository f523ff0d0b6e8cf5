"""Mixers on real processes beside the recurrence in float64: every kind of segments, and what
crosses ranks counted."""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import ringattn as ra
from ringattn.execution.carriers import end_distributed
from ringattn.planning.segments import Segments
from tests.test_mixers import MIXERS

dist.init_process_group("gloo", timeout=timedelta(seconds=300))
rank, world = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(1)
worst = 0.0
for lengths in ([world], [1, 20, 2, 15], [29]):
    n, mask = sum(lengths), ra.masks.documents(lengths)
    for layout in (
        ra.layouts.contiguous(n, world), ra.layouts.zigzag(n, world),
        ra.layouts.balanced(mask, world),
    ):  # fmt: skip
        segments = Segments(layout, lengths)
        for name, mixer in MIXERS.items():
            draw = torch.Generator().manual_seed(n)
            inputs = mixer.make(draw, n)
            reference = {key: x.clone().requires_grad_() for key, x in inputs.items()}
            want = mixer.whole(reference, lengths)
            d_out = torch.randn(want.shape, generator=draw, dtype=torch.float64)
            want.backward(d_out)
            own = {
                key: (x if key in mixer.shared else layout.shard(x, rank)).float().clone()
                for key, x in inputs.items()
            }
            for x in own.values():
                x.requires_grad_()
            out = mixer.split(own, segments, None)
            out.backward(layout.shard(d_out, rank).float())
            pairs = [(out.detach(), layout.shard(want.detach(), rank))]
            for key, x in reference.items():
                grad = own[key].grad
                if key in mixer.shared:
                    dist.all_reduce(grad)
                pairs.append((grad, x.grad if key in mixer.shared else layout.shard(x.grad, rank)))
            for got, wanted in pairs:
                error = float((got.double() - wanted).norm() / (wanted.norm() + 1))
                assert error < 1e-5, (name, layout, lengths, error)
                worst = max(worst, error)
print(f"rank {rank}: off by {worst:.1e} at most")
end_distributed()
