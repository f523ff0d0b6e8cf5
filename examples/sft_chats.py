"""SFT on packed conversations, loss on the assistant's tokens, LoRA: TRL's trainer, long sequences.

    torchrun --nproc-per-node 2 examples/sft_chats.py                    # here, on CPUs, a minute
    torchrun --nproc-per-node 8 examples/sft_chats.py --model FOLDER --data CHATS.jsonl \
        --length 1048576 --bf16                                          # 8 GPUs, 1M tokens a row

The first makes up a small model, a tokenizer of bytes and some chats. FOLDER is a model of
transformers whose tokenizer has a chat template; CHATS.jsonl has lines {"messages": [...]}. What
the second holds on each GPU is predicted before there is one (train.py's forecast, of the same
split, checkpointing and offload):

    ringattn estimate model=transformers model.path=FOLDER model.lora.rank=16 ranks=8 \
        seq_len=1048576 parallel.layout=balanced parallel.schedule=auto precision=bf16 \
        memory=long memory.ffn_tile=null memory.offload=true \
        engine=fsdp engine.zero_stage=3 hardware=h100

For a model of Qwen 2.5 7B's sizes it says 33.2 GiB a GPU and 49.4 GiB of host memory a rank.
"""

import argparse
import random
import tempfile

import datasets
import peft
import torch
import transformers
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import ringattn.hf
from ringattn.comm import end_distributed

CHAT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}"
    "{% else %}<|assistant|>{% generation %}{{ m['content'] }}</s>{% endgeneration %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class LongSFTTrainer(ringattn.hf.SplitSequences, trl.SFTTrainer):
    """TRL's trainer, its sequences split over ranks."""


def bytes_tokenizer() -> transformers.PreTrainedTokenizerFast:
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *special]
    core = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>",
        additional_special_tokens=special[2:], chat_template=CHAT,
    )  # fmt: skip


def small_model() -> transformers.PreTrainedModel:
    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=256, eos_token_id=257,
        pad_token_id=257,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="ringattn")


def made_up_chats(count: int = 64) -> datasets.Dataset:
    """Questions that can be learned: the words of the user, backwards."""
    draw, rows = random.Random(0), []
    for _ in range(count):
        words = ["".join(draw.choices("abcde", k=4)) for _ in range(draw.randint(2, 12))]
        question, answer = " ".join(words), " ".join(reversed(words))
        rows.append([{"role": "user", "content": question},
                     {"role": "assistant", "content": answer}])  # fmt: skip
    return datasets.Dataset.from_list([{"messages": row} for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="folder of a model; by default a small one is made")
    parser.add_argument("--data", help="JSONL of chats; by default some are made up")
    parser.add_argument("--out", help="folder to write to; by default nothing is kept")
    parser.add_argument("--cp", type=int, help="ranks that share a sequence; by default all")
    parser.add_argument("--length", type=int, default=256, help="tokens of a packed row")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        # First, since this makes the process group.
        arguments = trl.SFTConfig(
            options.out or scratch, max_length=options.length, packing=True,
            packing_strategy="bfd_split", assistant_only_loss=True, max_steps=options.steps,
            per_device_train_batch_size=1, gradient_accumulation_steps=2, learning_rate=1e-3,
            logging_steps=1, report_to=[], disable_tqdm=True, bf16=options.bf16,
            use_cpu=not torch.cuda.is_available(), save_strategy="epoch" if options.out else "no",
            activation_checkpointing=True,
            model_init_kwargs={"dtype": "bfloat16"} if options.model and options.bf16 else None,
            # Weights over all ranks, where there are several GPUs.
            fsdp=torch.cuda.device_count() > 1,
        )  # fmt: skip
        tokenizer = bytes_tokenizer()
        if options.model:
            tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
        chats = made_up_chats()
        if options.data:
            chats = datasets.load_dataset("json", data_files=options.data, split="train")
        trainer = LongSFTTrainer(
            options.model or small_model(),
            arguments,
            train_dataset=chats,
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(r=16, target_modules="all-linear"),
            split=ringattn.hf.Split(
                cp=options.cp or arguments.world_size,
                offload=torch.cuda.is_available(),
            ),
        )
        trainer.train()
        if trainer.is_world_process_zero():
            losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
            print("losses", losses)


if __name__ == "__main__":
    main()
    end_distributed()
