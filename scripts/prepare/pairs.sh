#!/usr/bin/env bash
# pairs.sh PROMPTS --output my_pairs [flags]: preference pairs from nothing but prompts (a .txt of one a line, a .json, or a
# name of prompts/): generates images, scores them and pairs them. Started again, it makes what is missing; with another
# --rule, --min_gap or --vote it only makes new pairs.
#   --models base[,RUN/unet.pth ...]   who draws (base: the base model itself)
#   --images DIR                       where images and scores lie (OUTPUT_images)
#   --rule, --min_gap, --vote          how they are paired: python -m eval.pairs --help
#   --metrics, --metrics_config, --device, --num_workers, --score_batch_size    eval.score's
#   all others (--pretrained_model_name_or_path, --num_images_per_prompt, --cfg ...) are eval.generate's
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
need_packages

usage() { echo "usage: bash scripts/prepare/pairs.sh PROMPTS --output my_pairs [--models base[,RUN/unet.pth]] [flags]" >&2; exit 2; }
[ $# -ge 1 ] && [[ "$1" != -* ]] || usage
prompts="$1"; shift
[[ "$prompts" == *.txt || "$prompts" == *.json || -e "$ROOT/prompts/$prompts.json" ]] || usage

models=() output="" images="" score=() pair=() generate=() metrics=() bucket=generate
for word in "$@"; do
  value=""
  case "$word" in --*=*) value="${word#*=}" ;; esac
  case "$word" in
    --models|--models=*) bucket=models; word="$value" ;;
    --output|--output=*) bucket=output; word="$value" ;;
    --images|--images=*) bucket=images; word="$value" ;;
    --metrics|--metrics=*) bucket=metrics; word="$value" ;;
    --rule|--rule=*|--min_gap|--min_gap=*|--vote|--vote=*) bucket=pair ;;
    --score_batch_size*) bucket=score; word="--batch_size${word#--score_batch_size}" ;;
    --metrics_config|--metrics_config=*) bucket=config ;;
    --num_workers|--num_workers=*|--device|--device=*) bucket=score ;;
    --*) bucket=generate ;;
  esac
  [ -n "$word" ] || continue
  case $bucket in
    models) IFS=, read -ra named <<< "$word"; models+=("${named[@]}") ;;
    output) output="$word" ;;
    images) images="$word" ;;
    metrics) metrics+=("$word") ;;
    config) score+=("$word") pair+=("$word") ;;
    score) score+=("$word") ;;
    pair) pair+=("$word") ;;
    *) generate+=("$word") ;;
  esac
done
[ -n "$output" ] || usage
images="${images:-${output%/}_images}"
[ ${#models[@]} -gt 0 ] || models=(base)
[ ${#metrics[@]} -gt 0 ] || metrics=(pickscore)

label_of() { # base; of RUN/unet.pth the run's folder
  case "$1" in *.pth|*.safetensors) basename "$(cd "$(dirname "$1")" && pwd)" ;; *) basename "$1" ;; esac
}
list="$(mktemp)"
trap 'rm -f "$list"' EXIT
manifests=() labels=()
for model in "${models[@]}"; do
  label="$(label_of "$model")"
  for other in ${labels[@]+"${labels[@]}"}; do
    [ "$other" != "$label" ] || { echo "error: two of --models are called $label: rename the folder of one" >&2; exit 1; }
  done
  say "images by $label"
  bash "$ROOT/scripts/eval/generate.sh" --prompts "$prompts" --unet_path "$model" --output_dir "$images/$label" --no_zip \
    --num_images_per_prompt 8 ${generate[@]+"${generate[@]}"} --manifest_list "$list"
  manifests+=("$(cat "$list")") labels+=("$label")
done
say "scores"
run "$PYTHON" -m eval.score --manifests "${manifests[@]}" --metrics "${metrics[@]}" ${score[@]+"${score[@]}"}
say "pairs"
run "$PYTHON" -m eval.pairs --manifests "${manifests[@]}" --models "${labels[@]}" --metrics "${metrics[@]}" \
  ${pair[@]+"${pair[@]}"} --output "$output"
