#!/usr/bin/env bash
# quickstart.sh [OUTPUT]: from nothing to a tuned model and a report, in minutes on a laptop.
# Makes .venv, installs, trains a small model that draws shapes with and without the safeguard, draws the same prompts with
# base and both, scores the drawings and compares them. A second run skips what is done; delete OUTPUT to start over.
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

pids=()
beside() { # beside NAME COMMAND...: run it beside what comes next, its output in a file
  local name="$1"; shift
  run "$@" > "$output/$name.log" 2>&1 &
  pids+=("$!:$name")
  echo "($name runs beside this: $output/$name.log)"
}
join() { # wait for what runs beside, and show what it said if it failed
  local one
  for one in "${pids[@]}"; do wait "${one%%:*}" || { cat "$output/${one#*:}.log" >&2; exit 1; }; done
  pids=()
}
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
trap 'exit 130' INT; trap 'exit 143' TERM  # a training run that is stopped ends with 0, and the next step would come

say "1 of 5: a small base model that draws shapes, and preference pairs that others drew"
run "$PYTHON" -m shapes.quickstart prepare --output "$output"

say "2 of 5: Diffusion-DPO, plain and with the safeguard"
train=(--pretrained_model_name_or_path "$output/base" --train_data_dir "$output/pairs" --resolution 32 --no_hflip
       --mixed_precision no --train_batch_size 16 --gradient_accumulation_steps 1 --max_train_steps 150
       --lr_warmup_steps 10 --learning_rate 2.5e-4 --lr_scheduler cosine --noise_offset 0.1 --scale_lr false
       --dataloader_num_workers 0 --seed 0 --checkpointing_steps 0 --checkpoints_total_limit 1)
beside plain bash scripts/train/sd15_diffusion_dpo.sh "${train[@]}" --output_dir "$output/plain" \
  --use_winner_preserving false --winner_preserving_mu 0
run bash scripts/train/sd15_diffusion_dpo.sh "${train[@]}" --output_dir "$output/safeguarded"
join

say "3 of 5: drawings of the prompt group 'shapes' from the same noise"
generate=(--pretrained_model_name_or_path "$output/base" --prompts shapes --height 32 --width 32 --num_inference_steps 20
          --cfg_convention diffusers --cfg 1.5 --limit 32 --batch_size 32 --mixed_precision no --no_zip)
beside drawings-base "$PYTHON" -m eval.generate --unet_path "$output/base/unet" --output_dir "$output/eval/base" "${generate[@]}"
beside drawings-plain "$PYTHON" -m eval.generate --unet_path "$output/plain/unet.pth" --output_dir "$output/eval/plain" "${generate[@]}"
run "$PYTHON" -m eval.generate --unet_path "$output/safeguarded/unet.pth" --output_dir "$output/eval/safeguarded" "${generate[@]}"
join

say "4 of 5: what the oracle says of them, and the three on one page"
score=(--metrics oracle shape colour background position cleanliness --metrics_config shapes/metrics.yaml)
drawn() { ls "$output/eval/$1"/shapes_*cfg.json; }
run "$PYTHON" -m eval.leaderboard --manifests "$(drawn base)" "$(drawn plain)" "$(drawn safeguarded)" "${score[@]}" \
  --output "$output/leaderboard" > "$output/leaderboard.log" 2>&1 || { cat "$output/leaderboard.log" >&2; exit 1; }
run "$PYTHON" -m shapes.quickstart table --output "$output"

say "5 of 5: the safeguarded model against the base"
run bash scripts/eval/test_vs.sh --json_a "$(drawn safeguarded)" --json_b "$(drawn base)" --label_a safeguarded --label_b base \
  --outdir "$output/compare" "${score[@]}"

say "Done in $(( SECONDS - started )) s"
cat <<END
trained UNet       $output/safeguarded/unet.pth  (and a diffusers pipeline in that folder)
drawings           $output/samples.png
all three models   $output/leaderboard/leaderboard.html
against the base   $(ls -t "$output"/compare/*/report.html | head -1)
END
