#!/usr/bin/env bash
# Rebuild a base model of the shapes world from nothing into shapes/base (under 2 hours on 2 cores).
#     bash scripts/build_base.sh
#     bash scripts/build_base.sh sd3    # the SD3-shaped one, into shapes/base_sd3 (an hour of one core), on the other's VAE
# What an earlier call finished is kept; output/base and output/base_sd3 are the builds' folders, with their logs, build.log.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$ROOT"
need_packages
kind="${1:-sd15}"
case "$kind" in
  sd15) output=output/base ;;
  sd3) output=output/base_sd3 ;;
  *) echo "usage: bash scripts/build_base.sh [sd15|sd3]" >&2; exit 2 ;;
esac
mkdir -p "$output"

if [ "$kind" = sd3 ]; then
  for step in prepare train ship judge; do
    run "$PYTHON" -m shapes.base "$step" --kind sd3 --output "$output"
  done 2>&1 | tee "$output/build.log"
  exit
fi

train() { # the UNet, on the mixture of good and poor drawings
  run "$PYTHON" -m accelerate.commands.launch --config_file configs/accelerate/cpu.yaml train.py --train_method sft \
    --pretrained_model_name_or_path "$output/start" --train_data_dir "$output/pairs" --resolution 32 --no_hflip \
    --mixed_precision no --train_batch_size 32 --lr_scheduler cosine --adam_weight_decay 0 \
    --proportion_empty_prompts 0.1 --checkpointing_steps 300 --checkpoints_total_limit 1 "$@"
}

{
  run "$PYTHON" -m shapes.base prepare --output "$output"
  train --output_dir "$output/first" --learning_rate 2e-3 --lr_warmup_steps 60 --max_train_steps 1800 --seed 0
  # Offset noise makes it learn the backgrounds' brightness, which the first pass leaves pale; then it is trained on.
  train --output_dir "$output/second" --unet_init "$output/first/unet.pth" --noise_offset 0.1 \
    --learning_rate 1e-3 --lr_warmup_steps 30 --max_train_steps 1100 --seed 1
  train --output_dir "$output/trained" --unet_init "$output/second/unet.pth" --noise_offset 0.1 \
    --learning_rate 1e-3 --lr_warmup_steps 30 --max_train_steps 4500 --seed 2
  run "$PYTHON" -m shapes.base ship --output "$output"
  run "$PYTHON" -m shapes.base judge
} 2>&1 | tee "$output/build.log"
