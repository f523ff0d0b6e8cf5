#!/usr/bin/env bash
# How base/ was made, in about half an hour on two cores: a byte-level Llama of two layers that knows texts of at most
# 1,024 tokens. First it learns to look (numbers in a haystack of 512 bytes), then to read beside it (source code), then
# both at 1,024. Each stage goes on from the exported model of the one before. Texts and needles take turns, one sequence
# a rank and step: in one step the five digits of a needle would weigh nothing beside the bytes of a text.
set -euo pipefail
OUT=${OUT:-runs/base}
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
train() { torchrun --standalone --nproc-per-node 2 train.py logger=none parallel.cp=1 train.sample_tokens=0 "$@"; }
both=(data=mix "data.mix=[{root: '\${stdlib:}', glob: '[!s]*/**/*.py', weight: 1}, {format: passkey, weight: 3}]"
    seq_len=1024 batch_size=1 optim.lr=1e-3 optim.weight_decay=0.01 'optim.betas=[0.9,0.99]' eval.holdout=0.02
    eval.sequences=8 'eval.probes=[passkey]' eval.samples=16 eval.every=1000 'eval.lengths=[256,512,1024]')

train experiment=passkey batch_size=4 run_dir="$OUT/1"
ringattn export checkpoint="$OUT/1" out="$OUT/1-hf" dtype=float32
train model=hf model.path="$OUT/1-hf" "${both[@]}" train.steps=6000 run_dir="$OUT/2"
ringattn export checkpoint="$OUT/2" out="$OUT/2-hf" dtype=float32
train model=hf model.path="$OUT/2-hf" "${both[@]}" data.halvings=1 train.steps=5000 run_dir="$OUT/3"
ringattn export checkpoint="$OUT/3" out="$OUT/base" dtype=float32
