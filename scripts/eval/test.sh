#!/usr/bin/env bash
# test.sh sd15|sdxl|sd3|flux|qwen_image|z_image UNET [flags]: generate the prompt groups with UNET (or a transformer, or LoRA)
# under the published settings and score them with the five metrics. Leaves images, manifests, scores and joint_test_{SIZE}.log beside UNET.
# Flags: --metrics, --metrics_config, --num_workers, --skip_missing, --device and --score_batch_size go to eval.score, all
# others (--prompts, --limit, --seed, ...) to eval.generate.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
need_packages

kind="$1"; shift
if [ $# -lt 1 ] || [[ "$1" == -* ]]; then
  echo "usage: bash scripts/eval/test_$kind.sh /path/to/unet.pth [flags]" >&2
  exit 2
fi
unet="$1"; shift

generate=(--prompts papv2 hpsv2 partiprompts); score=(); bucket=generate
base() { generate+=(--pretrained_model_name_or_path "$1"); }
case "$kind" in
  sdxl) generate+=(--sdxl) ;;
  sd3) base stabilityai/stable-diffusion-3.5-medium ;;
  flux) base black-forest-labs/FLUX.1-dev ;;
  qwen_image) base Qwen/Qwen-Image ;;
  z_image) base Tongyi-MAI/Z-Image ;;
esac
for word in "$@"; do
  case "$word" in
    --score_batch_size*) bucket=score; word="--batch_size${word#--score_batch_size}" ;;
    --metrics|--metrics=*|--metrics_config|--metrics_config=*|--num_workers|--num_workers=*|--skip_missing|--device|--device=*)
      bucket=score ;;
    --*) bucket=generate ;;
  esac
  if [ $bucket = score ]; then score+=("$word"); else generate+=("$word"); fi
done

list="$(mktemp)"
trap 'rm -f "$list"' EXIT
bash "$ROOT/scripts/eval/generate.sh" --unet_path "$unet" "${generate[@]}" --manifest_list "$list"
mapfile -t manifests < "$list"

size="$(sed -E 's/.*_seed[0-9]+_([0-9]+)x([0-9]+)_.*/\1x\2/' <<< "${manifests[0]}")"
[ "${size%x*}" = "${size#*x}" ] && size="${size%x*}"
say "scoring"
first_start "the five metrics (14 GB)" "$@"
run "$PYTHON" -m eval.score --manifests "${manifests[@]}" --log_file "$(dirname "${manifests[0]}")/joint_test_$size.log" \
  "${score[@]}"
