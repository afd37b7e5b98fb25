#!/usr/bin/env bash
# generate.sh [eval.generate flags]: generate images on every GPU of this machine; prompt groups that --prompts names and
# prompts/ lacks are built first. NUM_PROCESSES sets the number of processes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
need_packages
first_start "the base (SD1.5 4 GB, SDXL 14 GB)" "$@"

groups=(papv2 hpsv2 partiprompts); reading=no
for word in "$@"; do
  case "$word" in
    --prompts) groups=(); reading=yes ;;
    --prompts=*) groups=("${word#--prompts=}"); reading=no ;;
    --*) reading=no ;;
    *) [ $reading = yes ] && groups+=("$word") ;;
  esac
done
for group in "${groups[@]}"; do
  case "$group" in papv2|hpsv2|partiprompts)
    if [ ! -e "$ROOT/prompts/$group.json" ]; then
      say "prompts/$group.json is missing: building it"
      run "$PYTHON" -m prompts.build "$group"
    fi ;;
  esac
done

count_processes
say "generating on $gpus GPU(s), $processes process(es)"
if [ "$processes" -gt 1 ]; then
  run "$PYTHON" -m accelerate.commands.launch --quiet --config_file "$ROOT/configs/accelerate/one_node.yaml" \
    --num_processes "$processes" --main_process_port 0 -m eval.generate "$@"
else
  run "$PYTHON" -m eval.generate "$@"
fi
