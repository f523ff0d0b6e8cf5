"""Runs of trainers of transformers and TRL: ``trainers.py FOLDER < cases``, one after another on
these ranks. Rank 0 writes what each logged and its weights to FOLDER.

A case says how it differs from the first lines of :func:`run`; without "cp" it is a plain trainer
in one process.
"""

import json
import os
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

os.environ |= {
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "CI": "1",
}
if __name__ == "__main__":
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # an optimizer of DeepSpeed would load all of it

import datasets
import peft
import torch
import torch.distributed as dist
import transformers
import trl
from accelerate.state import AcceleratorState, GradientState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import ringattn as ra
import ringattn.hf

transformers.utils.logging.set_verbosity_error()
datasets.disable_progress_bars()
datasets.disable_caching()

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 260, "head_dim": 8, "bos_token_id": 256,
    "eos_token_id": 257, "pad_token_id": 257,
}  # fmt: skip
MODELS = {
    "llama": partial(transformers.LlamaConfig, **SIZES),
    "gemma3": partial(
        transformers.Gemma3TextConfig, **SIZES, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gemma2": partial(
        transformers.Gemma2Config, **SIZES, sliding_window=8, final_logit_softcapping=3.0
    ),
    "moe": partial(
        transformers.Qwen3MoeConfig, **SIZES, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=24, decoder_sparse_step=1, norm_topk_prob=True,
        output_router_logits=True, router_aux_loss_coef=0.05,
    ),
    "hybrid": partial(
        transformers.Qwen3NextConfig, **SIZES, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=24, shared_expert_intermediate_size=24, decoder_sparse_step=1,
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"],
    ),
}  # fmt: skip
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|u|>{{ m['content'] }}{% else %}<|a|>"
    "{% generation %}{{ m['content'] }}</s>{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|a|>{% endif %}"
)
ENGINES = {
    "ddp": {},
    "fsdp2": {"fsdp": True, "fsdp_config": {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}},
    **{
        f"zero{stage}": {
            "deepspeed": {
                "zero_optimization": {
                    "stage": stage, "stage3_gather_16bit_weights_on_model_save": stage == 3
                },
                "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
                "gradient_clipping": "auto", "train_batch_size": "auto",
                "zero_allow_untested_optimizer": True, "bf16": {"enabled": False},
            }
        }
        for stage in (1, 2, 3)
    },
}  # fmt: skip


def tokenizer():
    """Bytes, and what a chat needs."""
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>", "<|u|>", "<|a|>"]
    core = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>",
        additional_special_tokens=["<|u|>", "<|a|>"],
    )  # fmt: skip
    made.chat_template = CHAT
    return made


def words(generator, least=3, most=30):
    count = int(torch.randint(least, most, (1,), generator=generator))
    return "".join(chr(97 + int(c)) for c in torch.randint(26, (count,), generator=generator))


def chats(count, seed):
    """Conversations of two turns, of unequal lengths."""
    draw = torch.Generator().manual_seed(seed)
    roles = ("user", "assistant") * 2
    rows = [[{"role": role, "content": words(draw)} for role in roles] for _ in range(count)]
    return datasets.Dataset.from_list([{"messages": row} for row in rows])


def preferences(count, seed):
    draw = torch.Generator().manual_seed(seed)
    names = ("prompt", "chosen", "rejected")
    return datasets.Dataset.from_list([{name: words(draw) for name in names} for _ in range(count)])


def completions(count, seed):
    """Whose prompts are not supervised."""
    rows = preferences(count, seed).rename_column("chosen", "completion")
    return rows.remove_columns("rejected")


def texts(count, seed):
    """Token ids alone, as a plain Trainer takes them."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(9, 40, (count,), generator=draw).tolist()
    rows = [torch.randint(256, (n,), generator=draw).tolist() for n in lengths]
    return datasets.Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])


def make_model(name, attention, **more):
    torch.manual_seed(0)
    config = MODELS[name](max_position_embeddings=512, **more)
    made = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, dtype=torch.float32
    )
    with torch.no_grad():
        for p in made.parameters():  # so that every weight matters
            p.add_(0.02 * torch.randn_like(p))
    return made


def quantized(model, folder):
    """The model in four bits, as bitsandbytes loads it."""
    if int(os.environ.get("RANK", 0)) == 0:
        model.save_pretrained(folder / "base")
    if dist.is_initialized():
        dist.barrier()
    four_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    attention = model.config._attn_implementation
    made = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "base", quantization_config=four_bits, attn_implementation=attention,
        dtype=torch.float32,
    )  # fmt: skip
    for module in made.modules():
        # Of CPUs with bf16 instructions, bitsandbytes packs weights anew for evaluations, in bf16
        # and not for so small ones.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return made


def make_trainer(case, folder):
    kind, cp = case.get("trainer", "sft"), case.get("cp")
    names = {"sft": trl.SFTTrainer, "dpo": trl.DPOTrainer, "plain": transformers.Trainer}
    settings = {"sft": trl.SFTConfig, "dpo": trl.DPOConfig, "plain": transformers.TrainingArguments}
    options = {
        "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "max_steps": 3,
        "logging_steps": 1, "learning_rate": 3e-3, "report_to": [], "save_strategy": "no",
        "use_cpu": True, "disable_tqdm": True, "activation_checkpointing": True, "bf16": False,
        "warmup_steps": 1, "max_grad_norm": 0.5, "seed": 3, "optim": "adamw_torch",
        "dataloader_pin_memory": False, "include_num_input_tokens_seen": True,
        "adam_epsilon": 1e-6,
    }  # fmt: skip
    if kind == "sft":
        options |= {"max_length": 128, "packing": True}
    options |= case.get("args", {}) | ENGINES[case.get("engine", "ddp")]
    attention = case.get("attention", "ringattn" if cp else "eager")
    model = make_model(case.get("model", "llama"), attention, **case.get("config", {}))
    if case.get("quantized"):
        model = quantized(model, folder)
    if case.get("half"):
        model = model.bfloat16()
    more, data = {}, {"sft": chats, "dpo": preferences, "plain": texts}[kind]
    if case.get("data") == "completions":
        data = completions
    if kind == "plain":
        more["data_collator"] = transformers.DataCollatorWithFlattening(return_seq_idx=False)
    else:
        more["processing_class"] = tokenizer()
    if case.get("lora"):
        more["peft_config"] = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    if case.get("prompts"):
        more["peft_config"] = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    base = names[kind]
    if cp:
        base = type("Long", (ringattn.hf.SplitSequences, base), {})
        more["split"] = ringattn.hf.Split(cp, **case.get("split", {}))
    counts = case.get("samples", [24, 5])
    return base(
        model, args=settings[kind](str(folder), **options), train_dataset=data(counts[0], 0),
        eval_dataset=data(counts[1], 1), **more,
    )  # fmt: skip


def generated(trainer):
    prompt = torch.arange(97, 105)[None]
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    ours = isinstance(trainer, ringattn.hf.SplitSequences)
    with ringattn.hf.whole_sequences(model) if ours else nullcontext():
        out = model.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=True)
    return out[0].tolist()


def forget():
    """What is kept of the last case, in accelerate's states and in the environment."""
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state()
    GradientState._reset_state()
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]


def run(case, folder):
    forget()
    own = folder / case["name"]
    trainer = make_trainer(case, own)
    resumed = case.get("resume")
    trainer.train(resume_from_checkpoint=str(folder / resumed) if resumed else None)
    evaluated = trainer.evaluate()
    found = {"logs": trainer.state.log_history, "evaluated": evaluated}
    if case.get("predict"):
        found["logits"] = trainer.predict(trainer.eval_dataset).predictions.tolist()
    if case.get("generate"):
        found["generated"] = generated(trainer)
    split = case.get("engine", "ddp") != "ddp"
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped if split else trainer.model)
    if trainer.is_world_process_zero():
        own.mkdir(exist_ok=True)
        trained = {k: x.detach().clone() for k, x in weights.items() if x is not None}
        if case.get("quantized"):
            trained = {k: x for k, x in trained.items() if "lora" in k}
        torch.save({k: x.float() for k, x in trained.items()}, own / "weights.pt")
        (own / "found.json").write_text(json.dumps(found))
    ra.make.forget()


if __name__ == "__main__":
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    for each in cases:
        run(each, folder)
    if dist.is_initialized():
        dist.destroy_process_group()
