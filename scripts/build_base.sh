#!/usr/bin/env bash
# Rebuild the base model of the shapes world from nothing into shapes/base (under 2 hours on 2 cores).
#     bash scripts/build_base.sh [extra train.py flags]
# What an earlier call finished is kept; outputs/base is the build's folder, its log outputs/base/build.log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/python ] && export PATH="$PWD/.venv/bin:$PATH"
output=outputs/base
mkdir -p "$output"

{
    python -m shapes.base prepare --output "$output"
    accelerate launch --config_file configs/accelerate/cpu.yaml train.py \
        --pretrained_model_name_or_path "$output/start" --train_data_dir "$output/pairs" --output_dir "$output/trained" \
        --train_method sft --resolution 32 --no_hflip --mixed_precision no --train_batch_size 32 --learning_rate 2e-3 \
        --lr_scheduler cosine --lr_warmup_steps 60 --max_train_steps 1800 --checkpointing_steps 300 \
        --checkpoints_total_limit 1 --proportion_empty_prompts 0.1 --adam_weight_decay 0 --seed 0 "$@"
    python -m shapes.base ship --output "$output"
} 2>&1 | tee "$output/build.log"
