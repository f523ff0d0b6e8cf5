#!/usr/bin/env bash
# 8B at 1,048,576 tokens on 8 GPUs: big.sh MODEL TEXT. Every step can be repeated; a finished one is not done again.
set -euo pipefail
MODEL=$1 TEXT=$2 OUT=${OUT:-runs/million}
cd "$(dirname "$0")/../.."
recipe=(experiment=continue_llama "model.path=$MODEL")

ringattn estimate "${recipe[@]}" ranks=8
ringattn plan n=1M world=8 layout=zigzag heads=32 kv_heads=8 --check
torchrun --nproc-per-node 8 -m ringattn verify mask=causal n=16384 heads=32 kv_heads=8 head_dim=128 dtype=bf16

[ -e "$OUT-tokens/tokens.json" ] || ringattn tokenize root="$TEXT" tokenizer="$MODEL" out="$OUT-tokens"
# With eval.first the model is evaluated as it came, before the first step.
torchrun --nproc-per-node 8 --max-restarts 3 train.py "${recipe[@]}" data.root="$OUT-tokens" run_dir="$OUT" eval.first=true
ringattn report "$OUT"
[ -e "$OUT-longer" ] || ringattn export checkpoint="$OUT" out="$OUT-longer" tokenizer="$MODEL"
