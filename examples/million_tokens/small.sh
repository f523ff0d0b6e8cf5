#!/usr/bin/env bash
# 1,024 to 16,384 tokens on two CPU cores: the steps of big.sh with a model of a megabyte.
set -euo pipefail
OUT=${OUT:-runs/small}
cd "$(dirname "$0")/../.."
recipe=(experiment=continue_small model.path=examples/million_tokens/base)
export OMP_NUM_THREADS=1

ringattn estimate "${recipe[@]}" ranks=2
ringattn plan n=16k world=2 layout=zigzag heads=4 kv_heads=4 head_dim=32 --check
torchrun --standalone --nproc-per-node 2 -m ringattn verify mask=causal n=512 heads=4 head_dim=32 dtype=fp32

# As it came, with its own RoPE (null: what its config.json says): no step, one evaluation.
own=(model.rope.type=null model.rope.theta=null model.rope.factor=null model.rope.original_length=null)
torchrun --standalone --nproc-per-node 2 train.py "${recipe[@]}" "${own[@]}" train.steps=0 eval.first=true \
    run_dir="$OUT-before" "$@"
torchrun --standalone --nproc-per-node 2 train.py "${recipe[@]}" run_dir="$OUT" "$@"
ringattn report "$OUT"
[ -e "$OUT-longer" ] || ringattn export checkpoint="$OUT" out="$OUT-longer" dtype=float32
