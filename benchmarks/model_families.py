"""Model families of transformers on split sequences: which are right, and which are refused and
why.

    python benchmarks/model_families.py

Every family is a small random model, unchanged, in float32: packed documents of odd lengths over 2
and 3 ranks, the loss and all gradients beside transformers' own eager attention in one process.
"""

from __future__ import annotations

import argparse
import copy
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf

import ringattn as ra
from ringattn.context import shift_labels
from ringattn.execution.carriers import VirtualWorld
from ringattn.hf.describe import config_of, masks
from ringattn.hf.trained import SplitModel
from ringattn.models import hf_config
from ringattn.models.memory import Memory
from ringattn.strategy import Strategy
from ringattn.training.attention import Attention

LENGTHS = [23, 5, 17, 1, 13]  # tokens of the documents
PLAIN = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": None, "max_position_embeddings": 128,
}  # fmt: skip
SIZES = PLAIN | {"head_dim": 8}
WINDOW = SIZES | {"sliding_window": 9}
EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.1}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
         "mamba_chunk_size": 8}  # fmt: skip
STATES = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 61, "state_size": 8}
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
         "linear_value_head_dim": 8}  # fmt: skip
CAUSAL, MASKED, PAIRS = (
    hf.AutoModelForCausalLM, hf.AutoModelForMaskedLM, hf.AutoModelForSeq2SeqLM,
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """``packed``: whether transformers itself tells packed documents apart by their positions;
    where not, the documents are computed one by one in one process. ``refused``: why, as a regular
    expression."""

    title: str
    config: Callable[[], Any]
    about: str = ""
    auto: Any = CAUSAL
    packed: bool = True
    causal: bool = True
    refused: str | None = None


COVERED = {
    "llama": Family("Llama 3", lambda: hf.LlamaConfig(**SIZES)),
    "llama-ntk": Family(
        "Llama, dynamic NTK",
        lambda: hf.LlamaConfig(
            **SIZES | {"max_position_embeddings": 12},
            rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        ),
        "RoPE by the length of the longest document, not of a shard",
    ),
    "mistral": Family("Mistral", lambda: hf.MistralConfig(**WINDOW), "window"),
    "gemma2": Family(
        "Gemma 2",
        lambda: hf.Gemma2Config(**WINDOW, attn_logit_softcapping=5.0, query_pre_attn_scalar=8),
        "window and global, softcap",
    ),
    "gemma3": Family(
        "Gemma 3 (text)",
        lambda: hf.Gemma3TextConfig(**WINDOW | {"num_hidden_layers": 6}, query_pre_attn_scalar=8),
        "5 windows : 1 global, two RoPE bases",
    ),
    "gpt-oss": Family(
        "gpt-oss",
        lambda: hf.GptOssConfig(
            **WINDOW, num_local_experts=4, num_experts_per_tok=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
        "window and global, sinks, experts",
        packed=False,
    ),
    "olmo3": Family("Olmo 3", lambda: hf.Olmo3Config(**WINDOW), "3 windows : 1 global"),
    "cohere2": Family("Cohere 2", lambda: hf.Cohere2Config(**WINDOW), "3 windows : 1 global, NoPE"),
    "qwen2": Family(
        "Qwen 2, mixed",
        lambda: hf.Qwen2Config(**WINDOW, use_sliding_window=True, max_window_layers=2),
        "global and window",
    ),
    "qwen3": Family("Qwen 3", lambda: hf.Qwen3Config(**SIZES)),
    "llama4": Family(
        "Llama 4 (text)",
        lambda: hf.Llama4TextConfig(
            **SIZES, attention_chunk_size=8, num_local_experts=2, num_experts_per_tok=1,
            intermediate_size_mlp=48, interleave_moe_layer_step=2, floor_scale=16, attn_scale=0.5,
        ),
        "3 chunked : 1 global, experts; scales by position",
    ),
    "qwen3-moe": Family(
        "Qwen 3 MoE",
        lambda: hf.Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=24, **EXPERTS),
        "router loss over all tokens",
    ),
    "mixtral": Family(
        "Mixtral",
        lambda: hf.MixtralConfig(**SIZES, num_local_experts=4, **EXPERTS),
        "router loss over all tokens",
    ),
    "smollm3": Family("SmolLM3", lambda: hf.SmolLM3Config(**SIZES), "NoPE in every fourth layer"),
    "glm4": Family("GLM-4", lambda: hf.Glm4Config(**SIZES)),
    "deepseek-v3": Family(
        "DeepSeek-V3",
        lambda: hf.DeepseekV3Config(
            **PLAIN | {"num_key_value_heads": 4}, q_lora_rank=16, kv_lora_rank=16,
            qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12, n_routed_experts=4,
            n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=24, n_group=2,
            topk_group=1, first_k_dense_replace=1,
        ),
        "latent attention, experts",
    ),
    "phi3": Family("Phi-3", lambda: hf.Phi3Config(**PLAIN, sliding_window=9), "window"),
    "phi3-long": Family(
        "Phi-3, longrope",
        lambda: hf.Phi3Config(
            **PLAIN,
            rope_parameters={
                "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
                "long_factor": [1.5, 2.0, 3.0, 4.0], "original_max_position_embeddings": 16,
                "factor": 8.0,
            },
        ),
        "RoPE by the length of the longest document, not of a shard",
    ),
    "modernbert": Family(
        "ModernBERT",
        lambda: hf.ModernBertConfig(
            **PLAIN, local_attention=8, global_attn_every_n_layers=2, cls_token_id=1,
            sep_token_id=2, attention_dropout=0.0, embedding_dropout=0.0, mlp_dropout=0.0,
        ),
        "encoder: windows and global, both ways",
        MASKED,
        packed=False,
        causal=False,
    ),
    "bert": Family(
        "BERT",
        lambda: hf.BertConfig(
            **PLAIN | {"num_key_value_heads": 4}, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        "encoder",
        MASKED,
        packed=False,
        causal=False,
    ),
    "embedding-gemma": Family(
        "EmbeddingGemma",
        lambda: hf.Gemma3TextConfig(
            **WINDOW | {"num_hidden_layers": 3, "sliding_window": 8}, query_pre_attn_scalar=8,
            use_bidirectional_attention=True,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        "encoder: windows and global, both ways",
        packed=False,
        causal=False,
    ),
    "qwen3-next": Family(
        "Qwen3-Next",
        lambda: hf.Qwen3NextConfig(
            **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
            shared_expert_intermediate_size=24, **DELTA,
        ),
        "3 gated delta rules : 1 global, short convolutions, experts",
        packed=False,
    ),
    "lfm2": Family(
        "LFM2",
        lambda: hf.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"] * 2, block_ff_dim=48),
        "short convolutions and attention",
        packed=False,
    ),
    "bamba": Family(
        "Bamba",
        lambda: hf.BambaConfig(**SIZES, attn_layer_indices=[1, 3], **MAMBA),
        "Mamba-2 and attention",
        packed=False,
    ),
    "nemotron-h": Family(
        "Nemotron-H",
        lambda: hf.NemotronHConfig(
            **{k: v for k, v in SIZES.items() if k != "num_hidden_layers"},
            layer_types=["linear_attention", "full_attention", "mlp", "linear_attention"],
            mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, n_groups=1, chunk_size=8,
        ),
        "Mamba-2, attention, feed-forward",
        packed=False,
    ),
    "granite-hybrid": Family(
        "Granite 4 hybrid",
        lambda: hf.GraniteMoeHybridConfig(
            **SIZES, layer_types=["linear_attention", "full_attention"] * 2, num_local_experts=2,
            num_experts_per_tok=1, shared_intermediate_size=24, **MAMBA,
        ),
        "Mamba-2 and attention, experts",
        packed=False,
    ),
    "jamba": Family(
        "Jamba",
        lambda: hf.JambaConfig(
            **SIZES, attn_layer_period=2, attn_layer_offset=1, num_experts=2, num_experts_per_tok=1,
            mamba_d_state=8,
        ),
        "Mamba-1 and attention, experts",
        packed=False,
    ),
    "qwen3.5": Family(
        "Qwen 3.5 (text)",
        lambda: hf.Qwen3_5TextConfig(**SIZES, **DELTA),
        "3 gated delta rules : 1 global",
        packed=False,
    ),
    "olmo-hybrid": Family(
        "Olmo hybrid",
        lambda: hf.OlmoHybridConfig(**SIZES),
        "3 gated delta rules : 1 global",
        packed=False,
    ),
    "kimi-linear": Family(
        "Kimi Linear",
        lambda: hf.KimiLinearConfig(
            **PLAIN | {"num_key_value_heads": 4, "head_dim": 8}, kv_lora_rank=16,
            qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, num_experts=4,
            num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
            layer_types=[*["linear_attention"] * 3, "full_attention"],
        ),
        "delta rule with a decay for each channel, latent attention, experts",
        packed=False,
    ),
    "minimax": Family(
        "MiniMax",
        lambda: hf.MiniMaxConfig(
            **SIZES, num_local_experts=4, num_experts_per_tok=2, block_size=8
        ),
        "lightning attention and attention, experts",
        packed=False,
    ),
    "falcon-h1": Family(
        "Falcon-H1",
        lambda: hf.FalconH1Config(**SIZES, mamba_d_ssm=64, **MAMBA),
        "Mamba-2 beside attention in every layer",
        packed=False,
    ),
    "zamba2": Family(
        "Zamba2",
        lambda: hf.Zamba2Config(
            **PLAIN, mamba_d_state=8, mamba_headdim=8, mamba_ngroups=1, chunk_size=8,
            n_mamba_heads=8, attention_head_dim=16, num_mem_blocks=1,
            layers_block_type=["mamba", "hybrid"] * 2,
        ),
        "Mamba-2, one shared attention",
        packed=False,
    ),
    "lfm2-moe": Family(
        "LFM2 MoE",
        lambda: hf.Lfm2MoeConfig(
            **SIZES, layer_types=["conv", "full_attention"] * 2, num_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=24, num_dense_layers=1,
        ),
        "short convolutions and attention, experts",
        packed=False,
    ),
    "mamba": Family(
        "Mamba", lambda: hf.MambaConfig(**STATES), "Mamba-1 alone", packed=False,
    ),
    "falcon-mamba": Family(
        "FalconMamba", lambda: hf.FalconMambaConfig(**STATES), "Mamba-1 alone", packed=False,
    ),
    "mamba2": Family(
        "Mamba-2",
        lambda: hf.Mamba2Config(**STATES, num_heads=8, head_dim=8, chunk_size=8, n_groups=1),
        "Mamba-2 alone",
        packed=False,
    ),
}  # fmt: skip
_MIXES = r"\({}\) mixes tokens without"
REFUSED = {
    "rwkv": Family(
        "RWKV",
        lambda: hf.RwkvConfig(hidden_size=32, num_hidden_layers=2, vocab_size=61),
        refused=r"attention\.time_shift " + _MIXES.format("ZeroPad2d"),
    ),
    "t5": Family(
        "T5",
        lambda: hf.T5Config(
            d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=61,
            decoder_start_token_id=0,
        ),
        auto=PAIRS,
        refused="encoder and a decoder: cross attention",
    ),
    "bloom": Family(
        "BLOOM (ALiBi)",
        lambda: hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=61),
        refused="computes with one by itself \\(ALiBi",
    ),
    "mpt": Family(
        "MPT (ALiBi)",
        lambda: hf.MptConfig(d_model=32, n_layers=2, n_heads=4, vocab_size=61, max_seq_len=128),
        refused="computes with one by itself \\(ALiBi",
    ),
    "bart": Family(
        "BART's decoder",
        lambda: hf.BartConfig(
            d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48,
            vocab_size=61, dropout=0.0,
        ),
        refused="its loss is .* it ignores one of them",
    ),
}  # fmt: skip


def make(family: Family, attention: str) -> torch.nn.Module:
    """The random model; every weight matters."""
    torch.manual_seed(0)
    config = copy.deepcopy(family.config())
    model = family.auto.from_config(config, attn_implementation=attention).float()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.train()


def whole(family: Family, lengths: list[int]) -> tuple[torch.Tensor, ...]:
    """Tokens, labels ``[1, tokens]`` and the mask that all layers share."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(61, (1, sum(lengths)), generator=generator)
    masked = tokens.where(tokens % 3 == 0, -100)
    labels = shift_labels(tokens, lengths) if family.causal else masked
    return tokens, labels, ra.masks.documents(lengths, family.causal)


def in_one_process(family: Family, lengths: list[int]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss (a mean over all supervised tokens) and gradients, by eager attention."""
    model = make(family, "eager")
    tokens, labels, _ = whole(family, lengths)
    count = int((labels != -100).sum())
    parts = [sum(lengths)] if family.packed else lengths
    each = torch.cat([torch.arange(n) for n in lengths])[None]
    loss = torch.zeros(())
    for ids, own, positions in zip(
        *(x.split(parts, 1) for x in (tokens, labels, each)), strict=True
    ):
        if not bool((own != -100).any()):
            continue
        keys = {"labels": own, "shift_labels": own, "num_items_in_batch": count}
        loss = loss + _loss(family, model, ids, positions, keys)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters()}


def _loss(family: Family, model: Any, ids: Any, positions: Any, keys: dict) -> torch.Tensor:
    if family.auto is CAUSAL:
        return model(input_ids=ids, position_ids=positions, use_cache=False, **keys).loss
    logits = model(input_ids=ids, position_ids=positions).logits
    total = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), keys["labels"].flatten(), ignore_index=-100, reduction="sum"
    )
    return total / keys["num_items_in_batch"]


def split(
    family: Family, cp: int, lengths: list[int], layout: str = "zigzag", **as_make_plan: Any
) -> tuple[float, dict[str, torch.Tensor]]:
    """The same over ``cp`` virtual ranks, gradients summed over them."""
    ours = make(family, ra.hf.NAME)
    tokens, labels, mask = whole(family, lengths)
    count = int((labels != -100).sum())
    plans = ra.hf.make_plans(ours, mask, layout, world=cp, **as_make_plan)

    def work(rank: Any) -> tuple[torch.Tensor, dict]:
        model = copy.deepcopy(ours).train()
        batch = ra.hf.local_batch(plans, rank.rank, tokens)
        own = labels[:, torch.from_numpy(plans_layout.positions(rank.rank))]
        keys = {"labels": own, "shift_labels": own, "num_items_in_batch": count}
        with ra.hf.split_sequence(model, plans, rank):
            loss = _loss(family, model, batch["input_ids"], batch["position_ids"], keys)
            loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters()}

    plans_layout = next(iter(plans.values())).layout
    losses, grads = zip(*VirtualWorld(cp).run(work), strict=True)
    total: dict[str, torch.Tensor] = {}
    for name in grads[0]:
        # A rank whose tokens never reach an expert has no gradient for it.
        parts = [grad[name] for grad in grads if grad[name] is not None]
        if parts:
            total[name] = sum(parts)
    return float(sum(losses)), total


def errors(ours: tuple, theirs: tuple) -> tuple[float, float, str]:
    """Relative error of the loss, the largest one of a gradient, and whose it is."""
    (loss, grads), (want, wants) = ours, theirs
    worst, whose = 0.0, ""
    # Of some biases (of keys) the gradient is 0, but for rounding.
    least = 1e-6 * max(float(grad.norm()) for grad in wants.values() if grad is not None)
    for name, grad in wants.items():
        if grad is None or float(grad.norm()) <= least:
            continue
        error = float((grads[name] - grad).norm() / grad.norm()) if name in grads else 1.0
        if error > worst:
            worst, whose = error, name
    return abs(loss - want) / abs(want), worst, whose


def refusal(family: Family, cp: int = 2) -> str:
    """What a training step of the model raises."""
    model = make(family, ra.hf.NAME)
    tokens, _, mask = whole(family, [45])
    plan = ra.make_plan(mask, ra.layouts.zigzag(45, cp))

    def work(rank: Any) -> None:
        own, batch = copy.deepcopy(model), ra.hf.local_batch(plan, rank.rank, tokens)
        with ra.hf.split_sequence(own, plan, rank):
            own(**batch, num_items_in_batch=44)

    try:
        VirtualWorld(cp).run(work)
    except ValueError as error:
        return str(error)
    return ""


def ways_to_train(family: Family) -> str:
    """Which ``model=`` of train.py takes it: found by asking."""
    config = family.config()
    if not family.causal:
        return "no"
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        config = config_of(Path(folder))
        try:
            texts, types = masks(config)
        except ra.hf.NotCovered:
            return "no"
        attention = Attention(kinds=texts, pattern=types)
        layers = attention.layers(len(types))
        model = SplitModel(config, Memory(), layers)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        each = attention.masks([40], 40)
        plans = Strategy(1).plans(each, layers, attention.states([40], 40))
        model.self_check(model, plans, None, "auto")
        try:
            hf_config.read(Path(folder))
        except hf_config.UnknownModel:
            return "transformers"
    return "hf, transformers"


def table() -> str:
    """The rows of docs/models.md."""
    rows = [
        "| family | layers | 2 and 3 ranks | loss off by | gradients off by | `train.py model=` |",
        "|---|---|---|---|---|---|",
    ]
    for family in COVERED.values():
        want = in_one_process(family, LENGTHS)
        found = [errors(split(family, cp, LENGTHS), want) for cp in (2, 3)]
        loss, grad = (max(each[i] for each in found) for i in (0, 1))
        right = "equal" if loss <= 1e-5 and grad <= 2e-4 else "**differ**"
        rows.append(f"| {family.title} | {family.about} | {right} | {loss:.0e} | {grad:.0e} | "
                    f"{ways_to_train(family)} |")  # fmt: skip
    rows += ["", "| family | refused, because |", "|---|---|"]
    for family in REFUSED.values():
        said = refusal(family)
        assert re.search(family.refused, said), (family.title, said)
        rows.append(f"| {family.title} | {said.split('. A ')[0]} |")
    return "\n".join(rows)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    warnings.simplefilter("ignore")
    hf.logging.set_verbosity_error()
    print(table())


if __name__ == "__main__":
    main()
