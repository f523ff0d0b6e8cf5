"""Log-probabilities on split sequences, whole results of split calls, and ordinary use between."""

import copy

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import ringattn as ra
from ringattn.batches import IGNORED, position_ids, shift_labels
from ringattn.execution.carriers import VirtualWorld
from ringattn.hf import (
    NotCovered,
    Split,
    compile_layers,
    local_batch,
    make_plans,
    split_sequence,
    token_logprobs,
    whole_sequences,
)
from ringattn.hf.head import _KNOWN
from ringattn.hf.planner import Planner
from ringattn.hf.whole import whole_calls

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": None,
}  # fmt: skip
MODELS = {
    "llama": transformers.LlamaConfig(**SIZES),
    "gemma2": transformers.Gemma2Config(
        **SIZES, head_dim=8, sliding_window=7, final_logit_softcapping=2.0, query_pre_attn_scalar=8
    ),
    "granite": transformers.GraniteConfig(**SIZES, logits_scaling=7.0),
    "moe": transformers.Qwen3MoeConfig(
        **SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        output_router_logits=True, router_aux_loss_coef=0.1,
    ),
}  # fmt: skip


def make(name, attention, noise=0.1):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        copy.deepcopy(MODELS[name]), attn_implementation=attention
    ).float()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn_like(p))
    return model


def packed(lengths):
    return position_ids(ra.layouts.contiguous(sum(lengths), 1), 0, lengths)[None]


def in_one_process(model, ids, labels, lengths, temperature=1.0):
    """Of each token's label, by all logits: [batch, tokens]."""
    logits = model(input_ids=ids, position_ids=packed(lengths), use_cache=False).logits
    shifted = shift_labels(labels, lengths)
    each = (logits / temperature).log_softmax(-1)
    picked = each.gather(-1, shifted.clamp(min=0)[..., None])[..., 0]
    return picked.where(shifted != IGNORED, 0.0)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def ratio_loss(each, old):
    """Of the kind of GRPO: not a sum over tokens of a function of the model alone."""
    ratio = (each - old).exp()
    advantage = torch.linspace(-1, 1, each.shape[1])
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(sorted(MODELS)), st.lists(st.integers(1, 17), min_size=1, max_size=4),
    st.integers(1, 4), st.sampled_from(["balanced", "zigzag", "striped"]), st.booleans(),
    st.integers(1, 40),
)  # fmt: skip
def test_they_and_their_gradients_are_those_of_all_logits(
    name, lengths, world, layout, gather, chunk
):
    n = sum(lengths)
    if n < 4 * world:  # every rank has a token, in any layout
        lengths, n = [*lengths, 4 * world], n + 4 * world
    draw = torch.Generator().manual_seed(n)
    ids = torch.randint(60, (1, n), generator=draw)
    labels = ids.where(torch.rand(1, n, generator=draw) < 0.7, IGNORED)
    plain = make(name, "eager")
    want = in_one_process(plain, ids, labels, lengths, 0.7)
    old = want.detach() + 0.3 * torch.randn(1, n, generator=draw)
    ratio_loss(want, old).sum().backward()
    wanted = gradients(plain)
    models = [make(name, "ringattn") for _ in range(world)]
    plans = make_plans(models[0], ra.masks.documents(lengths), layout, world=world)

    def work(rank):
        model, own = models[rank.rank], torch.from_numpy(plans.layout.positions(rank.rank))
        batch = local_batch(plans, rank.rank, ids, labels)
        with split_sequence(model, plans, rank):
            each = token_logprobs(
                model, batch, plans, rank, gather=gather, temperature=0.7, chunk=chunk
            )
            loss = ratio_loss(each, old) if gather else ratio_loss_of(each, old, own)
            loss.sum().backward()
        return each.detach()

    got = VirtualWorld(world).run(work)
    whole = got[0] if gather else plans.layout.unshard(got)
    assert (whole - want).abs().max() <= 2e-5
    for key, value in wanted.items():
        total = sum(dict(m.named_parameters())[key].grad for m in models)
        assert (total - value).norm() <= 1e-4 * value.norm().clamp(min=1e-3), (name, key)


def ratio_loss_of(each, old, own):
    """The same of a rank's own tokens."""
    n = old.shape[1]
    advantage = torch.linspace(-1, 1, n)[own]
    ratio = (each - old[:, own]).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)


@pytest.mark.parametrize("noise", [0.1, 1e-4])
def test_a_softcap_is_seen_however_small_logits_are(noise):
    """In training they grow into it."""
    model = make("gemma2", "ringattn", noise)
    model.config.final_logit_softcapping = 30.0
    plans = make_plans(model, ra.masks.causal(20), "zigzag", world=1)
    token_logprobs(model, local_batch(plans, 0, torch.arange(20)[None]), plans).sum().backward()
    assert [known.softcap for known in _KNOWN[model].values()] == [30.0]


def test_logits_that_are_no_product_of_the_head_are_refused():
    class Odd(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits + 0.1 * out.logits.square()
            return out

    torch.manual_seed(0)
    model = Odd._from_config(MODELS["llama"], attn_implementation="ringattn")
    plans = make_plans(model, ra.masks.causal(20), "zigzag", world=1)
    with pytest.raises(NotCovered, match="not its head's product"):
        token_logprobs(model, local_batch(plans, 0, torch.arange(20)[None]), plans)


@pytest.mark.parametrize("train", [False, True])
def test_logits_of_all_tokens_never_exist(train):
    model, rows = make("llama", "ringattn"), []
    head = model.lm_head
    plain = head.forward

    def watched(x):
        rows.append(x.shape[:-1].numel())
        return plain(x)

    plans = make_plans(model, ra.masks.causal(50), "zigzag", world=1)
    batch = local_batch(plans, 0, torch.arange(50)[None])
    with torch.set_grad_enabled(train), split_sequence(model, plans):
        token_logprobs(model, batch, plans, chunk=8)  # learns from a few tokens
        head.forward = watched
        each = token_logprobs(model, batch, plans, chunk=8)
        if train:
            each.sum().backward()
    assert max(rows) == 8 and sum(rows) == 49 * (1 + train)  # the last token has no label


def test_a_recomputed_layer_needs_its_split():
    model = make("llama", "ringattn").train()
    model.gradient_checkpointing_enable()
    plans = make_plans(model, ra.masks.causal(20), "zigzag", world=1)
    batch = local_batch(plans, 0, torch.arange(20)[None])
    with pytest.raises(RuntimeError, match="call it, and backward, inside of"):
        token_logprobs(model, batch, plans)
    with torch.no_grad():
        assert token_logprobs(model, batch, plans).shape == (1, 20)
    with pytest.raises(ValueError, match="no shift_labels"):
        token_logprobs(model, {"input_ids": torch.arange(20)[None]}, plans)


@pytest.mark.parametrize("unpad", [False, True])
def test_calls_are_whole(unpad):
    """Rows in, rows out: loss, logits and gradients as without a split, on every rank."""
    ids = torch.randint(3, 60, (3, 21), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if unpad:
        mask[0, 15:] = 0
        mask[2, :4] = 0  # from the left, as for prompts
    labels = ids.where(mask.bool(), IGNORED)
    labels[2, 4] = IGNORED  # one process would predict it from padding
    plain = make("llama", "eager")
    want = plain(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
    want.loss.backward()
    models = [make("llama", "ringattn") for _ in range(3)]
    planner = Planner(models[0], Split(3), 4)

    def work(rank):
        model = models[rank.rank]
        given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        with whole_calls(model, planner, rank, unpad=unpad):
            loss = model(**given).loss
            loss.backward()
        with torch.no_grad(), whole_calls(model, planner, rank, unpad=unpad, logits=True):
            again = model(**given)
            vectors = {"inputs_embeds": model.get_input_embeddings()(given.pop("input_ids"))}
            embedded = model(**given, **vectors)
        assert torch.equal(embedded.loss, again.loss)
        return loss.detach(), again.loss, again.logits

    for loss, again, logits in VirtualWorld(3).run(work):
        assert abs(loss - want.loss) < 1e-5 and abs(again - want.loss) < 1e-5
        assert (logits - want.logits)[mask.bool()].abs().max() < 1e-4
        assert not logits[~mask.bool()].any()
    for key, p in plain.named_parameters():
        # What DDP makes of them: their mean.
        mean = sum(dict(m.named_parameters())[key].grad for m in models) / 3
        assert (mean - p.grad).norm() <= 1e-5 * p.grad.norm().clamp(min=1e-2), key


def test_ranks_with_other_batches_are_refused_on_all():
    models = [make("llama", "ringattn") for _ in range(2)]
    planner = Planner(models[0], Split(2), 4)

    def work(rank):
        ids = torch.arange(20)[None] + rank.rank
        split = whole_calls(models[rank.rank], planner, rank)
        with split, pytest.raises(ValueError, match="batches") as error:
            models[rank.rank](input_ids=ids, labels=ids)
        return str(error.value)

    assert all("different batches" in said for said in VirtualWorld(2).run(work))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_outside_of_a_split_a_model_generates_as_transformers_does(name):
    prompt = torch.arange(3, 12)[None]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    plain, ours = make(name, "eager").eval(), make(name, "ringattn").eval()
    with pytest.raises(RuntimeError, match="whole_sequences"):
        ours.generate(prompt, **options)
    calls = []
    ours.model.register_forward_hook(
        lambda module, args, kwargs, out: calls.append(out.past_key_values), with_kwargs=True
    )
    with whole_sequences(ours):
        got = ours.generate(prompt, **options)
        assert (ours(prompt).logits - plain(prompt).logits).abs().max() < 1e-4
    assert got.tolist() == plain.generate(prompt, **options).tolist()
    assert calls[0] is not None and len(calls) == 9  # a cache: the prompt is computed once
    assert ours.config._attn_implementation == "ringattn"
    plans = make_plans(ours, ra.masks.causal(9), "zigzag", world=1)
    with split_sequence(ours, plans):
        with pytest.raises(RuntimeError, match="inside of a split"), whole_sequences(ours):
            pass
        ours(**local_batch(plans, 0, prompt))


@pytest.mark.parametrize("again", [False, True])
def test_compiled_layers_are_not_compiled_again_for_another_plan(again):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    plain, ours = make("llama", "eager").train(), make("llama", "ringattn").train()
    if again:
        ours.gradient_checkpointing_enable()
    planner = Planner(ours, Split(1), 4)
    compile_layers(ours, backend=backend)
    counts = []
    for n in (30, 41, 52, 33, 27):
        ids = torch.arange(n)[None] % 60
        with whole_calls(ours, planner):
            loss = ours(input_ids=ids, labels=ids).loss
            loss.backward()
        assert abs(loss - plain(input_ids=ids, labels=ids).loss) < 1e-5
        counts.append(len(graphs))
    assert counts[0] > 0 and counts[2] == counts[-1], counts
