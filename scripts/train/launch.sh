#!/usr/bin/env bash
# launch.sh PRESET [train.py flags]: run train.py with configs/train/PRESET.yaml on every GPU of this machine
# (presets spm_*: python -m spo.preference_model.train).
# Flags given here win over the preset. Environment, all optional: NUM_PROCESSES, ACCELERATE_CONFIG (a file of
# configs/accelerate), and for several machines NUM_MACHINES, MACHINE_RANK, MAIN_ADDRESS, MAIN_PORT.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

need_packages
preset="$1"; shift
first_start "the base (SD1.5 4 GB, SDXL 14 GB) and the data" "$@"
count_processes "${NUM_MACHINES:-1}"  # accelerate counts those of all machines
launch=(--config_file "${ACCELERATE_CONFIG:-$ROOT/configs/accelerate/$config.yaml}" --num_processes "$processes")
[ -n "${NUM_MACHINES:-}" ] && launch+=(--num_machines "$NUM_MACHINES" --machine_rank "${MACHINE_RANK:?the rank of this machine}"
                                       --main_process_ip "${MAIN_ADDRESS:?the address of machine 0}")
[ -n "${MAIN_PORT:-}" ] && launch+=(--main_process_port "$MAIN_PORT")

# Presets that accumulate 32 batches of 8 are for 8 devices, 2048 pairs per step: on any number, 256 / processes.
accumulation=()
accumulates() { # whether these words, or a yaml file among them, say how much
  local word
  for word in "$@"; do
    case "$word" in
      --gradient_accumulation_steps*) return 0 ;;
      *.yaml | *.yml) if grep -qs '^gradient_accumulation_steps:' "${word#--config=}"; then return 0; fi ;;
    esac
  done
  return 1
}
if grep -q '^gradient_accumulation_steps: 32' "$ROOT/configs/train/$preset.yaml" && ! accumulates "$@"; then
  accumulation=(--gradient_accumulation_steps "$(( 256 / processes > 0 ? 256 / processes : 1 ))")
fi

program=("$ROOT/train.py")
if [[ "$preset" == spm_* ]]; then program=(-m spo.preference_model.train); fi

say "$preset on $gpus GPU(s) of this machine, $processes process(es) in all"
[ "$gpus" -eq 0 ] && echo "no GPU found: this runs on the CPU, which suits only small models"
command=("$PYTHON" -m accelerate.commands.launch --quiet "${launch[@]}" "${program[@]}"
         --config "$ROOT/configs/train/$preset.yaml" ${accumulation[@]+"${accumulation[@]}"} "$@")  # bash 3.2 knows no empty array
show "${command[@]}"

# In a session of its own, so that Ctrl-C and a closed terminal reach this script alone. It passes any signal on to the
# training processes, which save and exit 0; their launcher would only kill them, or orphan them.
"$PYTHON" -c 'import os, sys; os.setsid(); os.execvp(sys.argv[1], sys.argv[1:])' "${command[@]}" &
launcher=$!
training_processes() { "$PYTHON" -c 'import psutil, sys
print(*(child.pid for child in psutil.Process(int(sys.argv[1])).children()))' "$launcher"; }
pass_on() {
  trap '' HUP  # a closing terminal may send it twice
  kill -TERM $(training_processes) 2>/dev/null || kill -TERM "$launcher" 2>/dev/null || true
}
trap pass_on TERM INT HUP
wait "$launcher" || true  # a signal ends this wait, not the launcher
while kill -0 "$launcher" 2>/dev/null; do wait "$launcher" || true; done
wait "$launcher"  # its exit code
