# Sourced by the other scripts: the project's root, its Python, and how to say what is run.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

# PYTHON, where it is set, wins over .venv, and that over the one on the PATH.
if [ -z "${PYTHON:-}" ]; then
  if [ -x "$ROOT/.venv/bin/python" ]; then PYTHON="$ROOT/.venv/bin/python"; else PYTHON="$(command -v python3 || command -v python || true)"; fi
fi

need_packages() { # stop with one line where the requirements are not installed
  "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("torch", "diffusers", "accelerate"))))' 2>/dev/null || {
    echo "error: '$PYTHON' has no torch, diffusers or accelerate: pip install -r requirements.txt, or make .venv with" \
         "bash scripts/quickstart.sh" >&2; exit 1; }
}

count_gpus() { # torch is asked, which takes seconds, only where there is a device of NVIDIA's or AMD's
  if compgen -G "/dev/nvidia[0-9]*" >/dev/null || [ -e /dev/kfd ] || [ -e /dev/dxg ]
  then "$PYTHON" -c 'import torch; print(torch.cuda.device_count())'; else echo 0; fi
}

count_processes() { # count_processes [MACHINES]: sets gpus, processes (of all machines; NUM_PROCESSES of this one wins) and config
  gpus="$(count_gpus)"
  processes=$(( ${NUM_PROCESSES:-$(( gpus > 0 ? gpus : 1 ))} * ${1:-1} ))
  if [ "$processes" -gt 1 ]; then config=one_node; elif [ "$gpus" -gt 0 ]; then config=one_gpu; else config=cpu; fi
}

first_start() { # first_start WHAT [WORD ...]: what a first start waits for; silent where the words ask for help or name metrics
  local what="$1" word; shift
  for word in "$@"; do
    case "$word" in -h|--help|--metrics|--metrics=*) return 0 ;; esac
  done
  echo "(a first start takes a minute or two before its first line; what is not on this machine yet is downloaded: $what)"
}

say() { printf '\n== %s\n' "$*"; }

show() { printf '+'; printf ' %q' "$@"; printf '\n'; } # print a command as it could be typed

run() { show "$@"; "$@"; }

make_venv() { # make_venv REQUIREMENTS: .venv with these installed; done once for each content of the file
  local requirements="$ROOT/$1" base stamp
  stamp="$ROOT/.venv/.installed-$(cat "$ROOT"/requirements*.txt | cksum | cut -d' ' -f1)-$1"
  if [ ! -e "$stamp" ]; then
    if [ ! -x "$ROOT/.venv/bin/python" ]; then
      base=""
      for candidate in "${PYTHON_BASE:-}" python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 10))' 2>/dev/null
        then base="$candidate"; break; fi
      done
      if [ -z "$base" ]; then
        echo "error: no Python from 3.10 on found: install one, or name it with PYTHON_BASE=/path/to/python3" >&2; exit 1
      fi
      "$base" -c 'import sys; sys.exit(sys.version_info[:2] > (3, 13))' ||
        echo "warning: $("$base" --version) is newer than 3.13, the last that the tests were run with: trying it" >&2
      say "Making .venv with $("$base" --version)"
      "$base" -m venv "$ROOT/.venv"
    fi
    say "Installing $1 into .venv (once; 6 GB with torch: some minutes, by the network)"
    "$ROOT/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
    "$ROOT/.venv/bin/python" -m pip check
    touch "$stamp"
  fi
  PYTHON="$ROOT/.venv/bin/python"
}
