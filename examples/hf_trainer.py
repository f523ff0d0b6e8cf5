"""An unchanged Hugging Face model in the Hugging Face Trainer, its sequences split over all ranks.

    torchrun --nproc-per-node 2 examples/hf_trainer.py [folder to write to]

The model is a small random Llama and the text is made up, so that it runs anywhere; put your own
in their places. Three things differ from a plain Trainer: all ranks read the same sequences, the
collator keeps this rank's tokens of them, and a step happens inside split_sequence. The Trainer
itself counts the supervised tokens over all ranks and averages gradients, so the loss is the mean
over all tokens, whatever the split.
"""

import sys
import tempfile

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import ringattn
from ringattn.comm import end_distributed
from ringattn.hf import local_batch, split_sequence

TOKENS, BATCH, STEPS = 256, 2, 4


class SplitTrainer(Trainer):
    """A Trainer whose ranks share every sequence, as the plan says."""

    def __init__(self, *args, plan, **kwargs):
        super().__init__(*args, **kwargs)
        self.plan = plan

    def get_train_dataloader(self):
        # Not prepared by accelerate, which would give every rank other sequences.
        return DataLoader(
            self.train_dataset, self.args.train_batch_size, collate_fn=self.data_collator
        )

    def training_step(self, model, inputs, num_items_in_batch=None):
        with split_sequence(model, self.plan):
            return super().training_step(model, inputs, num_items_in_batch)


def main(folder: str) -> list[float]:
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=BATCH, max_steps=STEPS, logging_steps=1,
        learning_rate=1e-3, report_to=[], save_strategy="no", use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False, disable_tqdm=True, gradient_checkpointing=True,
    )  # fmt: skip
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    plan = ringattn.make_plan(ringattn.masks.causal(TOKENS), ringattn.layouts.zigzag(TOKENS, world))
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128, attn_implementation="ringattn", use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    text = [torch.randint(128, (TOKENS,)) for _ in range(BATCH * STEPS)]

    def collate(sequences):
        return local_batch(plan, rank, torch.stack(sequences))

    trainer = SplitTrainer(model, arguments, collate, text, plan=plan)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    if rank == 0:
        print("losses", losses)
    return losses


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(folder)
    end_distributed()
