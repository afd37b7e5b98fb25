#!/usr/bin/env bash
# Everything that docs/performance.md leaves to a GPU, measured on this machine: tables in output/performance/tables.md.
#     bash scripts/benchmark.sh [MODEL ...]      # sd15, sdxl, tiny; default: sd15 and sdxl on a GPU, else tiny
#     OUTPUT=DIR bash scripts/benchmark.sh       # another folder
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$ROOT"
need_packages

output="${OUTPUT:-output/performance}"
gpus="$(count_gpus)"
models=("$@")
if [ "${#models[@]}" = 0 ]; then
  if [ "$gpus" -gt 0 ]; then models=(sd15 sdxl); else models=(tiny); fi
fi
mkdir -p "$output"
: > "$output/tables.md"

measure() { # a program and its words: shown, run, and its tables kept below them
  printf '\n    python %s\n\n' "$*" | tee -a "$output/tables.md"
  "$PYTHON" "$@" | tee -a "$output/tables.md"
}

for model in "${models[@]}"; do
  size=()
  if [ "$model" = tiny ]; then size=(--batch 2 --accumulation 2 --steps 1); fi
  measure -m benchmarks.train_step --model "$model" --json "$output/$model.json" "${size[@]}"
  step="$("$PYTHON" -c 'import json, sys; print(sum(json.load(open(sys.argv[1]))[-1]["milliseconds"].values()))' "$output/$model.json")"
  measure -m benchmarks.safeguard --models "$model" --micro_step_ms "$step" "${size[@]:0:2}"
  if [ "$model" = tiny ]; then measure -m benchmarks.generation --model tiny --images 2 --batch 2 --steps 2
  else measure -m benchmarks.generation --model "$model" --compile; fi
done
if [ "$gpus" -gt 0 ]; then # waiting for the device, the exact reference in bf16, fp16's scaler, the compiler's kernels
  measure -m pytest -q tests/training/test_preference.py tests/models/test_policy.py tests/training/test_guards.py \
    tests/models/test_speed.py
fi
echo "tables: $output/tables.md"
