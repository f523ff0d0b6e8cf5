"""``attn_implementation="ringattn"``: transformers' own models on split sequences."""

import copy

import pytest
import torch
import transformers

import ringattn as ra
from ringattn.batches import shift_labels
from ringattn.execution.carriers import VirtualWorld
from ringattn.hf import local_batch, split_sequence

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": 60, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": None,
}  # fmt: skip
CONFIGS = {
    "llama": (transformers.LlamaConfig(**SIZES), None),
    "mistral": (transformers.MistralConfig(**SIZES, sliding_window=9), 9),
    "qwen3": (transformers.Qwen3Config(**SIZES), None),
    "gpt-oss": (
        transformers.GptOssConfig(
            **SIZES, num_local_experts=2, num_experts_per_tok=1, sliding_window=9,
            layer_types=["sliding_attention"] * 2,
        ),
        9,
    ),
    "gemma2": (
        transformers.Gemma2Config(
            **SIZES, attn_logit_softcapping=5.0, query_pre_attn_scalar=8,
            layer_types=["full_attention"] * 2,
        ),
        None,
    ),
}  # fmt: skip


def make(config, implementation):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        copy.deepcopy(config), attn_implementation=implementation
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.float()


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_gradients_are_those_of_eager_attention(name):
    config, window = CONFIGS[name]
    n = 45
    tokens = torch.randint(60, (2, n), generator=torch.Generator().manual_seed(0))
    eager = make(config, "eager")
    want = eager(input_ids=tokens, labels=tokens, use_cache=False).loss
    want.backward()
    ours = make(config, "ringattn")
    mask = ra.masks.causal(n) if window is None else ra.masks.sliding_window(n, window)
    for cp in (1, 4):
        plan = ra.make_plan(mask, ra.layouts.zigzag(n, cp))

        def work(rank, plan=plan):
            model = copy.deepcopy(ours)
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
            batch = local_batch(plan, rank.rank, tokens)
            with split_sequence(model, plan, rank):
                out = model(**batch, num_items_in_batch=2 * (n - 1), use_cache=False)
                out.loss.backward()
            return out.loss.detach(), {k: p.grad for k, p in model.named_parameters()}

        losses, grads = zip(*VirtualWorld(cp).run(work), strict=True)
        assert abs(sum(losses) - want) < 1e-4 * want, (name, cp)
        for key, p in eager.named_parameters():
            # A rank whose tokens never reach an expert has no gradient for it.
            parts = [g[key] for g in grads if g[key] is not None]
            if p.grad is None:
                continue
            assert (sum(parts) - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-7, (name, cp, key)


def test_a_loss_that_would_be_a_rank_s_own_mean_is_refused():
    ours = make(CONFIGS["llama"][0], "ringattn")
    plan = ra.make_plan(ra.masks.causal(45), ra.layouts.zigzag(45, 2))
    tokens = torch.arange(45)[None]

    def work(rank):
        batch = local_batch(plan, rank.rank, tokens)
        with split_sequence(ours_of[rank.rank], plan, rank):
            with pytest.raises(ValueError, match="num_items_in_batch is missing"):
                ours_of[rank.rank](**batch)
            logits = {k: x for k, x in batch.items() if "labels" not in k}
            return ours_of[rank.rank](**logits).logits.shape[1]

    ours_of = [copy.deepcopy(ours) for _ in range(2)]
    assert sum(VirtualWorld(2).run(work)) == 45


def test_labels_that_are_shifted_already_are_refused():
    plan = ra.make_plan(ra.masks.documents([20, 25]), ra.layouts.zigzag(45, 2))
    tokens = torch.randint(60, (2, 45), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[:, :7] = -100  # a prompt
    given = local_batch(plan, 0, tokens, labels)["shift_labels"]
    assert (given >= 0).sum() > 10
    with pytest.raises(ValueError, match="labels are those of the next token"):
        local_batch(plan, 0, tokens, shift_labels(labels, [20, 25]))


def test_packed_documents():
    config, _ = CONFIGS["llama"]
    lengths, n = [20, 5, 20], 45
    tokens = torch.randint(60, (1, n), generator=torch.Generator().manual_seed(0))
    eager, ours = make(config, "eager"), make(config, "ringattn")
    parts = tokens.split(lengths, 1)
    want = torch.cat([eager(input_ids=part).logits for part in parts], 1)
    plan = ra.make_plan(ra.masks.documents(lengths), ra.layouts.zigzag(n, 3))

    def work(rank):
        model, batch = copy.deepcopy(ours), local_batch(plan, rank.rank, tokens, None, lengths)
        with split_sequence(model, plan, rank):
            logits = model(batch["input_ids"], position_ids=batch["position_ids"]).logits
        return logits, batch["shift_labels"]

    logits, labels = (
        plan.layout.unshard(parts, 1) for parts in zip(*VirtualWorld(3).run(work), strict=True)
    )
    assert (labels == -100).nonzero()[:, 1].tolist() == [19, 24, 44]
    assert (logits - want).abs().max() < 1e-4


def test_misuse_is_an_error_that_says_how():
    config, _ = CONFIGS["mistral"]
    model, n = make(config, "ringattn"), 40
    tokens = torch.zeros(1, n, dtype=torch.long)
    plan = ra.make_plan(ra.masks.sliding_window(n, 9), ra.layouts.contiguous(n, 1))
    with pytest.raises(RuntimeError, match=r"with ringattn\.hf\.split_sequence"):
        model(tokens)
    padded = torch.ones(1, n, dtype=torch.long)
    assert split_and_call(model, plan, tokens, attention_mask=padded) is not None
    padded[0, 0] = 0
    with pytest.raises(ValueError, match="pack documents"):
        split_and_call(model, plan, tokens, attention_mask=padded)
    wide = ra.make_plan(ra.masks.causal(n), ra.layouts.contiguous(n, 1))
    with pytest.raises(ValueError, match="sliding_window=9"):
        split_and_call(model, wide, tokens)
    halves = ra.make_plan(ra.masks.sliding_window(n, 9), ra.layouts.contiguous(n, 2))
    with pytest.raises(ValueError, match="position_ids are missing"):
        split_and_call(model, halves, tokens[:, :20])
    with (
        split_sequence(model, plan),
        pytest.raises(RuntimeError, match="already"),
        split_sequence(model, plan),
    ):
        pass
    with pytest.raises(RuntimeError, match="needs a plan"):  # it ends with the block
        model(tokens)


def split_and_call(model, plan, tokens, **more):
    with split_sequence(model, plan):
        return model(tokens, **more)
