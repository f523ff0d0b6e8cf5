#!/usr/bin/env bash
# 8B at 1,048,576 tokens on 8 GPUs: big.sh MODEL TEXT. What takes long is not done again.
set -euo pipefail
MODEL=$1 TEXT=$2 OUT=${OUT:-runs/million}
cd "$(dirname "$0")/../.."
recipe=(experiment=continue_llama "model.path=$MODEL")

ringattn estimate "${recipe[@]}" ranks=8
ringattn plan n=1M world=8 layout=zigzag heads=32 kv_heads=8 --check
torchrun --nproc-per-node 8 -m ringattn verify mask=causal n=16384 heads=32 kv_heads=8 head_dim=128 dtype=bf16

[ -e "$OUT-tokens/tokens.json" ] || ringattn tokenize root="$TEXT" tokenizer="$MODEL" out="$OUT-tokens"
# As it came, with its own RoPE (null: what its config.json says): no step, one evaluation.
own=(model.rope.type=null model.rope.factor=null model.rope.original_length=null
    model.rope.beta_fast=null model.rope.beta_slow=null)
[ -s "$OUT-before/eval.jsonl" ] || torchrun --nproc-per-node 8 train.py "${recipe[@]}" "${own[@]}" \
    data.root="$OUT-tokens" train.steps=0 eval.first=true run_dir="$OUT-before"
torchrun --nproc-per-node 8 --max-restarts 3 train.py "${recipe[@]}" data.root="$OUT-tokens" run_dir="$OUT"
ringattn report "$OUT"
[ -e "$OUT-longer" ] || ringattn export checkpoint="$OUT" out="$OUT-longer" tokenizer="$MODEL"
