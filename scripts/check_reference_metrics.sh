#!/usr/bin/env bash
# check_reference_metrics.sh [WORK_FOLDER]: compare eval/metrics' HPSv2 and ImageReward with the packages hpsv2 and
# image-reward themselves. The same random full-size weights and the same images go through both; the largest difference
# is printed. Bar: 1e-4 on 224x224 images.
#
# WORK_FOLDER: default output/reference_check. Needs Python 3.10 (PYTHON310=/path/to/python3.10 where it is not found),
# about 6 GB for the reference environment (WORK_FOLDER/venv, built once), 8 GB for weights and 12 GB of memory.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
mkdir -p "${1:-output/reference_check}"
WORK="$(cd "${1:-output/reference_check}" && pwd)"
cd "$ROOT"

find_python310() {
  for candidate in "${PYTHON310:-}" python3.10 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.10.*/bin/python; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 10))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.10 found: install one, or name it with PYTHON310=/path/to/python3.10" >&2
  return 1
}

REFERENCE="$WORK/venv/bin/python"
if [ ! -e "$WORK/venv/built" ]; then
  base="$(find_python310)"
  say "building the reference environment with $base"
  "$base" -m venv --clear "$WORK/venv"
  run "$REFERENCE" -m pip install --quiet "pip<25" "setuptools<70" wheel
  grep -v -e '# no-deps' -e '^#' requirements-reference.txt > "$WORK/requirements.txt"
  grep '# no-deps' requirements-reference.txt > "$WORK/requirements-no-deps.txt"
  run "$REFERENCE" -m pip install --quiet -r "$WORK/requirements.txt"
  run "$REFERENCE" -m pip install --quiet --no-deps --no-build-isolation -r "$WORK/requirements-no-deps.txt"
  touch "$WORK/venv/built"
fi
# hpsv2's wheel lacks its vocabulary; open_clip's is the same file.
cp "$("$PYTHON" -c 'import open_clip; print(open_clip.__path__[0])')/bpe_simple_vocab_16e6.txt.gz" \
  "$WORK"/venv/lib/python3.10/site-packages/hpsv2/src/open_clip/

for metric in hpsv2 imagereward; do
  run "$PYTHON" scripts/reference_metrics.py prepare "$metric" "$WORK/$metric"
  say "scoring with the package of $metric"
  # in its own folder: image-reward asks for the tokenizer bert-base-uncased, and finds it there
  (cd "$WORK/$metric" && PYTHONPATH="" PYTHONWARNINGS=ignore "$REFERENCE" "$ROOT/scripts/reference_metrics.py" reference "$metric" .)
  run "$PYTHON" scripts/reference_metrics.py ours "$metric" "$WORK/$metric"
  rm -f "$WORK/$metric"/*.pt
done
say "largest differences"
"$PYTHON" scripts/reference_metrics.py compare all "$WORK"
