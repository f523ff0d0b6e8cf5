"""ring_attention on real processes against the oracle, for many masks and layouts."""

import sys
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import oracle

import ringattn as ra
from ringattn import cost
from ringattn.execution.carriers import Counted, ProcessRank, connect, end_distributed

dist.init_process_group("gloo", timeout=timedelta(seconds=300))
rank, world = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(1)
worst = 0.0
# Every schedule, with and without a split of the heads, also where these are replicated.
variants = [("ring", 1, 1), ("all_gather", 1, 1), ("direct", 1, 1), ("double_ring", 1, world)]
variants += [(name, world, 1) for name in ("ring", "direct")] if world > 1 else []
if world == 4:
    variants += [("double_ring", 1, 2), ("double_ring", 2, 2), ("direct", 2, 1)]
wants = {}  # the oracle's answer is that of all splits
for n in (world - 1 or 1, 50, 333):
    masks = [
        ra.masks.causal(n),
        ra.masks.full(n),
        ra.masks.sliding_window(n, 9),
        ra.masks.documents([n // 3, 1, n - n // 3 - 1] if n > 3 else [n]),
        ra.masks.prefix_lm(n, n // 2) - ra.masks.sinks(n, 1),
    ]
    for at, mask in enumerate(masks):
        for number, (schedule, ulysses, node) in enumerate(variants):
            for layout in (ra.layouts.NAMES[(number + at + shift) % 4] for shift in (0, 1)):
                heads, kv_heads = ((2, 2), (6, 2), (6, 1))[(number + n) % 3]
                heads, kv_heads = (heads * ulysses, kv_heads) if ulysses > 1 else (heads, kv_heads)
                plan = ra.make_plan(
                    mask, ra.layouts.build(layout, mask, world), schedule, ulysses, node_size=node
                )
                gen = torch.Generator().manual_seed(n)
                whole = [
                    torch.randn(2, n, h, 16, generator=gen)
                    for h in (heads, kv_heads, kv_heads, heads)
                ]
                *own, dout = (plan.layout.shard(x, rank) for x in whole)
                own = [x.requires_grad_() for x in own]
                counted = Counted(connect(None))
                out = ra.ring_attention(*own, plan, group=counted)
                got = [out.detach(), *torch.autograd.grad(out, own, dout)]
                bytes_ = cost.received(
                    plan, rank, cost.AttentionShape(heads, kv_heads, 16, None, 4, 2)
                )
                assert counted.received == bytes_.forward + bytes_.backward, plan
                if (n, at, heads, kv_heads) not in wants:
                    dense = mask.to_dense()
                    want = oracle.attention(*whole[:3], dense, whole[3])
                    wants[n, at, heads, kv_heads] = want
                for a, b in zip(got, wants[n, at, heads, kv_heads], strict=True):
                    scale = b.abs().max().clamp(min=0.5)
                    part = plan.layout.shard(b, rank)
                    if part.numel():
                        worst = max(worst, ((a - part).abs().max() / scale).item())
assert worst <= 1e-5, f"rank {rank}: relative error {worst}"

# What gloo does for GPUs, messages through other memory, on every exchange of a ring.
mask = ra.masks.causal(50)
plan = ra.make_plan(mask, ra.layouts.zigzag(50, world), "ring")
gen = torch.Generator().manual_seed(1)
whole = [torch.randn(1, 50, 2, 16, generator=gen) for _ in range(4)]
*own, dout = (plan.layout.shard(x, rank) for x in whole)
own = [x.requires_grad_() for x in own]
want = oracle.attention(*whole[:3], mask.to_dense(), whole[3])
with mock.patch.object(ProcessRank, "_staged", return_value=True):
    out = ra.ring_attention(*own, plan)
    got = [out.detach(), *torch.autograd.grad(out, own, dout)]
for a, b in zip(got, want, strict=True):
    assert oracle.error(a, plan.layout.shard(b, rank)) <= 1e-5

# The self-check must see attention that stays on its rank, and data that does not follow the mesh.
if world == 2:
    from ringattn.context import Context, Strategy, check_engaged, check_same_data
    from ringattn.models.decoder import Decoder, ModelConfig

    context = Context.create(2, torch.device("cpu"))
    sizes = {"dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn_dim": 64}
    model = Decoder(ModelConfig(vocab_size=50, **sizes), seed=0)

    def local_only(tokens, positions, attend):
        plan = ra.make_plan(
            ra.masks.causal(len(positions)), ra.layouts.contiguous(len(positions), 1)
        )
        return model(tokens, positions, lambda *qkv: ra.ring_attention(*qkv, plan, group=alone))

    def refused(check, *arguments):
        try:
            check(*arguments)
        except RuntimeError as error:
            return "self-check failed" in str(error)
        return False

    alone = [dist.new_group([r]) for r in range(2)][rank]
    check_engaged(context, Strategy(2), model, 50)
    assert refused(check_engaged, context, Strategy(2), local_only, 50)
    check_same_data(context, [0, 1], "text")
    assert refused(check_same_data, context, [0, 1], f"text of rank {rank}")
    assert refused(check_same_data, context, [rank], "text")
    check_same_data(Context.create(1, torch.device("cpu")), [rank], f"text of rank {rank}")
    assert refused(check_same_data, Context.create(1, torch.device("cpu")), [0], "text")

# context x data: two rings side by side in one world
if world == 4:
    from ringattn.context import Context, Strategy

    context = Context.create(2, torch.device("cpu"))
    assert (context.dp_rank, context.cp_rank) == divmod(rank, 2)
    gen = torch.Generator().manual_seed(context.dp_rank)
    *whole, dout = (torch.randn(1, 41, 2, 16, generator=gen) for _ in range(4))
    for schedule, ulysses in (("ring", 1), ("direct", 1), ("all_gather", 1), ("ring", 2)):
        strategy = Strategy(2, "balanced", schedule, ulysses, heads=2)
        plan = strategy.plan(ra.masks.prefix_lm(41, 7))
        own = [plan.layout.shard(x, context.cp_rank).requires_grad_() for x in whole]
        out = context.attend(plan)(*own)
        grads = torch.autograd.grad(out, own, plan.layout.shard(dout, context.cp_rank))
        wants = oracle.attention(*whole, plan.mask.to_dense(), dout)
        for got, want in zip((out, *grads), wants, strict=True):
            assert oracle.error(context.unshard(got, plan.layout), want) <= 1e-5
end_distributed()
