#!/usr/bin/env bash
# generate_spo.sh sd15|sdxl [UNET] [eval.generate flags]: images of SPO's published models under their own settings: the
# usual guidance convention (7.5 SD1.5, 5.0 SDXL), the pipeline's own scheduler and empty prompt (SDXL: zeros), fp16, seed 42.
# UNET: default SPO-Diffusion-Models/SPO-SD-v1-5_4k-p_10ep or SPO-SDXL_4k-p_10ep; a LoRA, a folder or a unet.pth will do.
set -euo pipefail

case "${1:-}" in
  sd15) unet=SPO-Diffusion-Models/SPO-SD-v1-5_4k-p_10ep; settings=(--cfg 7.5) ;;
  sdxl) unet=SPO-Diffusion-Models/SPO-SDXL_4k-p_10ep; settings=(--cfg 5.0 --sdxl) ;;
  *) echo "usage: bash scripts/eval/generate_spo.sh sd15|sdxl [UNET] [eval.generate flags]" >&2; exit 2 ;;
esac
shift
if [ $# -gt 0 ] && [[ "$1" != -* ]]; then unet="$1"; shift; fi
exec bash "$(dirname "${BASH_SOURCE[0]}")/generate.sh" --unet_path "$unet" --prompts own --cfg_convention diffusers \
  --scheduler default --empty_prompt pipeline --mixed_precision fp16 --seed 42 "${settings[@]}" "$@"
