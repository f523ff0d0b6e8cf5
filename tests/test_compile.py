"""torch.compile over ring_attention: one graph, no recompilation per plan, the same numbers."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint
from torch.utils.checkpoint import create_selective_checkpoint_contexts as selective

import ringattn as ra
from ringattn.execution import attention as attention_room
from ringattn.models.decoder import Decoder, ModelConfig

from .processes import ROOT, launch
from .test_attention import THREE, inputs

CONFIG = ModelConfig(
    dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=64, vocab_size=50, head_dim=16
)  # fmt: skip


def attention(q, k, v, sinks, plan, kernel):
    out, lse = ra.ring_attention(
        q * 1.5, k, v, plan, kernel=kernel, return_lse=True, softcap=20.0, sinks=sinks
    )
    return out.sin(), lse


def results(run, tensors, dout):
    leaves = [x.clone().requires_grad_() for x in tensors]
    out, lse = run(*leaves)
    return out, lse, *torch.autograd.grad(out, leaves, dout)


@pytest.mark.parametrize("kernel", THREE)
def test_one_graph_for_all_plans(kernel):
    """fullgraph: nothing breaks the graph; another plan may cost one more graph, a third none."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(attention, backend=count, fullgraph=True)
    n = 33
    q, k, v, dout = inputs(n, 2, 1, 16, batch=1)
    tensors = (q, k, v, torch.randn(2))
    for mask in (ra.masks.causal(n), ra.masks.full(n), ra.masks.sliding_window(n, 5)):
        plan = ra.make_plan(mask, ra.layouts.zigzag(n, 1))
        want = results(partial(attention, plan=plan, kernel=kernel), tensors, dout)
        got = results(partial(compiled, plan=plan, kernel=kernel), tensors, dout)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert len(graphs) == 2


def test_the_operators_tell_the_truth_about_their_shapes():
    """torch's own check of schema, fake implementation and autograd registration."""
    plan = ra.make_plan(ra.masks.causal(9), ra.layouts.zigzag(9, 1))
    q, k, v, _ = (x.requires_grad_() for x in inputs(9, 4, 2, 8, 12))
    for sinks in (None, torch.randn(4, requires_grad=True)):
        arguments = (q, k, v, sinks, False, plan.number, "", "aten", 0.3, 0.0, 1)
        torch.library.opcheck(torch.ops.ringattn.attention.default, arguments)


def test_a_compiled_model_trains_like_an_eager_one():
    """Inductor, forward and backward, over a decoder."""
    torch._dynamo.reset()
    n = 40
    plan = ra.make_plan(ra.masks.causal(n), ra.layouts.zigzag(n, 1))
    tokens = torch.randint(50, (2, n), generator=torch.Generator().manual_seed(0))

    def attend(q, k, v):
        return ra.ring_attention(q, k, v, plan)

    grads = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, fullgraph=True)):
        model = Decoder(CONFIG, seed=0)
        logits = wrap(model)(tokens, torch.arange(n), attend)
        logits.square().mean().backward()
        grads.append([logits.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_plan_that_nobody_kept_is_an_error_not_another_plan():
    q, k, v, _ = inputs(8)
    plan = ra.make_plan(ra.masks.causal(8), ra.layouts.zigzag(8, 1))
    with pytest.raises(RuntimeError, match="keep the plan"):
        torch.ops.ringattn.attention(
            q, k, v, None, False, plan.number + 10**6, "", "aten", 1.0, 0.0, 1
        )


def test_processes_with_split_heads():
    """Two ranks, ring and Ulysses, plans that change: compiled as eager."""
    status, output = launch(2, ROOT / "tests/workers/compiled.py")
    assert status == 0, output


def test_a_checkpoint_policy_can_keep_attention(monkeypatch):
    """Selective activation checkpointing sees one operator: kept, neither it nor its exchange runs
    again in the backward."""
    plan = ra.make_plan(ra.masks.causal(20), ra.layouts.zigzag(20, 1))
    forward, calls = attention_room.forward, []
    monkeypatch.setattr(attention_room, "forward", lambda *x: calls.append(1) or forward(*x))

    def keep(_, op, *args, **kwargs):
        ours = op == torch.ops.ringattn.attention.default
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    def block(q, k, v):
        return ra.ring_attention(q * 2, k, v, plan).sin()

    *own, dout = inputs(20)
    own = [x.requires_grad_() for x in own]
    want = torch.autograd.grad(block(*own), own, dout)
    assert len(calls) == 1
    for context, times in (({}, 2), ({"context_fn": partial(selective, keep)}, 1)):
        calls.clear()
        got = torch.autograd.grad(
            checkpoint(block, *own, use_reentrant=False, **context), own, dout
        )
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert len(calls) == times
