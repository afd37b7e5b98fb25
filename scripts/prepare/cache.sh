#!/usr/bin/env bash
# cache.sh PRESET DIR [train.py flags]: encode the images and prompts of configs/train/PRESET.yaml once, on every GPU of
# this machine, into DIR; the preset's training script takes them with --cached_dataset DIR. The flags are those of the
# training run that the cache is for. Started again, it makes what is missing. Environment: NUM_PROCESSES.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

need_packages
usage() { # SPO draws its own pairs: its presets have nothing to cache
  echo "usage: bash scripts/prepare/cache.sh PRESET DIR [train.py flags], PRESET one of" \
       "$(basename -s .yaml "$ROOT"/configs/train/*.yaml | grep -v -e spm_ -e _spo | xargs)"
}
for word in "$@"; do
  case "$word" in -h|--help) usage; exec "$PYTHON" -m data.cache --help ;; esac
done
[ $# -ge 2 ] || { usage >&2; exit 2; }
preset="$1" folder="$2"; shift 2
first_start "the base (SD1.5 4 GB, SDXL 14 GB) and the data"
count_processes

say "$preset, cached into $folder by $processes process(es) on $gpus GPU(s)"
run "$PYTHON" -m accelerate.commands.launch --quiet --config_file "$ROOT/configs/accelerate/$config.yaml" \
  --num_processes "$processes" -m data.cache --config "$ROOT/configs/train/$preset.yaml" --cached_dataset "$folder" "$@"
