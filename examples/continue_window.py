"""A model with sliding windows is trained on at a longer context: the Trainer of transformers.

    torchrun --nproc-per-node 2 examples/continue_window.py [folder to write to]

The model is a small random Gemma 3, five windows to one global layer, and the text is the Python
that runs, so that it runs anywhere; put your own in their places. What differs from a plain Trainer
is the class that is put before it, and `split`. In every epoch the model also writes a few bytes:
outside of a split it generates as transformers does.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch
import transformers

import ringattn.hf
from ringattn.comm import end_distributed

TOKENS, STEPS = 512, 6


class LongTrainer(ringattn.hf.SplitSequences, transformers.Trainer):
    """The Trainer, its sequences split over ranks."""


class Writes(transformers.TrainerCallback):
    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        prompt = torch.tensor([list(b"def ")], device=model.device)
        model.eval()
        with ringattn.hf.whole_sequences(model):
            out = model.generate(prompt, max_new_tokens=12, do_sample=False)
        if state.is_world_process_zero:
            print("writes", bytes(out[0].clamp(max=255).tolist()))


def rows() -> list[dict[str, list[int]]]:
    """Bytes of the standard library, a document a row."""
    paths = sorted(Path(os.__file__).parent.glob("*.py"))[: 4 * STEPS]
    return [{"input_ids": list(path.read_bytes()[:TOKENS])} for path in paths]


def main(folder: str) -> list[float]:
    arguments = transformers.TrainingArguments(
        folder, per_device_train_batch_size=2, max_steps=STEPS, logging_steps=1,
        learning_rate=3e-3, report_to=[], save_strategy="no", disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(), activation_checkpointing=True,
    )  # fmt: skip
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=64,
        pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    trainer = LongTrainer(
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation="ringattn"),
        arguments,
        train_dataset=rows(),
        # Rows end to end, with positions from 0 in each: documents do not see each other.
        data_collator=transformers.DataCollatorWithFlattening(),
        callbacks=[Writes()],
        split=ringattn.hf.Split(cp=arguments.world_size),
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    if trainer.is_world_process_zero():
        print("losses", losses)
    return losses


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(folder)
    end_distributed()
