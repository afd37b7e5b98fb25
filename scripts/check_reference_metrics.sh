#!/usr/bin/env bash
# Compare eval/metrics' HPSv2 and ImageReward with the packages hpsv2 and image-reward themselves: the same random
# full-size weights and the same images go through both, the largest difference is printed. Bar: 1e-4 on 224x224 images.
#
#   bash scripts/check_reference_metrics.sh [WORK_FOLDER]        # default output/reference_check
#
# Needs Python 3.10 (set PYTHON310 if it is not found), about 6 GB for the reference environment, 8 GB for the weights
# and 12 GB of memory. The reference environment, WORK_FOLDER/venv, is built once.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)
WORK=${1:-output/reference_check}
mkdir -p "$WORK"
WORK=$(cd "$WORK" && pwd)

find_python310() {
    for candidate in "${PYTHON310:-}" python3.10 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.10.*/bin/python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.10 found: install one or set PYTHON310=/path/to/python3.10" >&2
    return 1
}

REFERENCE=$WORK/venv/bin/python
if [ ! -e "$WORK/venv/built" ]; then
    BASE=$(find_python310)
    echo "building the reference environment with $BASE"
    "$BASE" -m venv --clear "$WORK/venv"
    "$REFERENCE" -m pip install --quiet --upgrade "pip<25"
    grep -v -e '# no-deps' -e '^#' requirements-reference.txt > "$WORK/requirements.txt"
    grep '# no-deps' requirements-reference.txt > "$WORK/requirements-no-deps.txt"
    "$REFERENCE" -m pip install --quiet -r "$WORK/requirements.txt"
    "$REFERENCE" -m pip install --quiet --no-deps --no-build-isolation -r "$WORK/requirements-no-deps.txt"
    touch "$WORK/venv/built"
fi
# hpsv2's wheel lacks its vocabulary; open_clip's is the same file.
cp "$("$PYTHON" -c 'import open_clip, pathlib; print(pathlib.Path(open_clip.__file__).parent)')/bpe_simple_vocab_16e6.txt.gz" \
   "$WORK"/venv/lib/python3.10/site-packages/hpsv2/src/open_clip/

for METRIC in hpsv2 imagereward; do
    "$PYTHON" scripts/reference_metrics.py prepare $METRIC "$WORK/$METRIC"
    (cd "$WORK/$METRIC" && "$REFERENCE" "$OLDPWD/scripts/reference_metrics.py" reference $METRIC .)
    "$PYTHON" scripts/reference_metrics.py ours $METRIC "$WORK/$METRIC"
    rm -f "$WORK/$METRIC"/*.pt
done
"$PYTHON" scripts/reference_metrics.py compare all "$WORK"
