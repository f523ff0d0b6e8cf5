"""Steps of GRPO (Shao et al. 2024, arXiv 2402.03300) on sequences split over all ranks.

    torchrun --nproc-per-node 2 examples/grpo.py

A small random model is to write even bytes after a prompt. Every rank generates the same groups of
answers, with the model as it is (`whole_sequences`); prompts and answers are packed into one row,
which the ranks share, and the loss is made of log-probabilities of this rank's tokens
(`token_logprobs`). It is a sum over tokens, so that gradients are summed over ranks, and the same
for any number of them.
"""

import os

import torch
import torch.distributed as dist
import transformers

import ringattn.hf
from ringattn.comm import end_distributed
from ringattn.hf import local_batch, split_sequence, token_logprobs, whole_sequences

GROUPS, ANSWERS, PROMPT, NEW, STEPS, CLIP = 2, 4, 6, 20, 6, 0.2


def rollout(model: torch.nn.Module, step: int) -> torch.Tensor:
    """[groups * answers, prompt + new tokens], alike on all ranks."""
    torch.manual_seed(step)
    prompts = torch.randint(3, 64, (GROUPS, PROMPT)).repeat_interleave(ANSWERS, 0)
    with torch.no_grad(), whole_sequences(model):
        return model.generate(prompts, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=True)


def advantages(rows: torch.Tensor) -> tuple[torch.Tensor, float]:
    """(Of each answer, beside the others of its group; the mean reward.)"""
    rewards = (rows[:, PROMPT:] % 2 == 0).float().mean(1).view(GROUPS, ANSWERS)
    apart = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    return apart.flatten(), float(rewards.mean())


def main() -> list[float]:
    if "RANK" in os.environ:
        dist.init_process_group()
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="ringattn")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for step in range(STEPS):
        rows = rollout(model, step)
        count, length = rows.shape
        advantage, reward = advantages(rows)
        # Answers end to end in one row, as packed documents; prompts are not supervised.
        labels = rows.clone()
        labels[:, :PROMPT] = -100
        mask = ringattn.masks.documents([length] * count)
        plans = ringattn.hf.make_plans(model, mask, "balanced", world=world)
        batch = local_batch(plans, rank, rows.view(1, -1), labels.view(1, -1))
        own = torch.from_numpy(plans.layout.positions(rank))
        weight = advantage.repeat_interleave(length)[own][None] / (count * NEW)
        supervised = batch["shift_labels"] != -100
        with torch.no_grad():
            old = token_logprobs(model, batch, plans)
        for _ in range(2):  # optimizer steps with these answers
            optimizer.zero_grad()
            with split_sequence(model, plans):
                ratio = (token_logprobs(model, batch, plans) - old).exp()
                clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
                loss = -torch.minimum(ratio * weight, clipped * weight)[supervised].sum()
                loss.backward()
            if world > 1:
                for p in model.parameters():
                    dist.all_reduce(p.grad)
            optimizer.step()
        total = loss.detach()
        if world > 1:
            dist.all_reduce(total)
        history.append((reward, float(total)))
    if rank == 0:
        print("rewards", [round(reward, 4) for reward, _ in history])
        print("losses", [loss for _, loss in history])
    return history


if __name__ == "__main__":
    main()
    end_distributed()
