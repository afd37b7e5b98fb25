#!/usr/bin/env bash
# quickstart.sh [OUTPUT]: from nothing to a tuned model and a report, in minutes on a laptop.
# Makes .venv, installs, trains a small model that draws shapes with and without the safeguard, draws images with it,
# scores them, compares them with the base's. A second run skips what is done; delete OUTPUT to start over.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_venv requirements.txt
cd "$ROOT"
output="${1:-output/quickstart}"
mkdir -p "$output"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false  # nothing is downloaded: models and data are made here
started=$SECONDS
cores="$("$PYTHON" -c 'import os; print(os.cpu_count() or 1)')"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( (cores + 1) / 2 ))}"  # two programs run at a time

beside() { # beside NAME COMMAND...: run it beside the next one, its output in a file
  local name="$1"; shift
  run "$@" > "$output/$name.log" 2>&1 &
  beside_pid=$!
  echo "($name runs beside this: $output/$name.log)"
}
join() { # join NAME: wait for what runs beside, and show what it said if it failed
  wait "$beside_pid" || { cat "$output/$1.log" >&2; exit 1; }
}
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
trap 'exit 130' INT; trap 'exit 143' TERM  # a training run that is stopped ends with 0, and the next step would come

say "1 of 5: a small base model that draws shapes, preference pairs, small models for the metrics"
run "$PYTHON" -m shapes.quickstart prepare --output "$output" --num_pairs 96

say "2 of 5: Diffusion-DPO, plain and with the safeguard"
common=(--pretrained_model_name_or_path "$output/base" --train_data_dir "$output/pairs" --resolution 32 --no_hflip
        --mixed_precision no --train_batch_size 16 --gradient_accumulation_steps 1 --max_train_steps 80
        --lr_warmup_steps 8 --learning_rate 3e-5 --lr_scheduler cosine --noise_offset 0.1 --scale_lr false
        --dataloader_num_workers 0 --seed 0 --checkpointing_steps 0 --checkpoints_total_limit 1)
beside plain bash scripts/train/sd15_diffusion_dpo.sh "${common[@]}" --output_dir "$output/plain" \
  --use_winner_preserving false --winner_preserving_mu 0
run bash scripts/train/sd15_diffusion_dpo.sh "${common[@]}" --output_dir "$output/safeguarded"
join plain

say "3 of 5: what they learned, and their drawings from the same noise"
run "$PYTHON" -m shapes.quickstart table --runs plain safeguarded --output "$output"

say "4 of 5: images of the prompt group 'shapes', by the base and by the safeguarded model"
generate=(--pretrained_model_name_or_path "$output/base" --prompts shapes --height 32 --width 32 --num_inference_steps 30
          --cfg_convention diffusers --cfg 1.5 --limit 24 --batch_size 24 --mixed_precision no --no_zip)
beside base "$PYTHON" -m eval.generate --unet_path "$output/base/unet" --output_dir "$output/eval/base" "${generate[@]}"
run "$PYTHON" -m eval.generate --unet_path "$output/safeguarded/unet.pth" --output_dir "$output/eval/safeguarded" "${generate[@]}"
join base

say "5 of 5: scores by the oracle and by the five metrics on small untrained models, and the comparison"
run bash scripts/eval/test_vs.sh --json_a "$output"/eval/safeguarded/shapes_*cfg.json --json_b "$output"/eval/base/shapes_*cfg.json \
  --label_a safeguarded --label_b base --outdir "$output/compare" --metrics_config "$output/metrics/metrics.yaml" \
  --metrics oracle pickscore hpsv2 aesthetics clip imagereward

echo "(PickScore, HPSv2, AesScore, CLIPScore and ImageReward are small untrained models here: of these rows only the oracle's says anything)"

say "Done in $(( SECONDS - started )) s"
cat <<END
trained UNet    $output/safeguarded/unet.pth  (and a diffusers pipeline in that folder)
samples         $output/samples.png
report          $(ls -t "$output"/compare/*/report.html | head -1)
END
