#!/usr/bin/env bash
# compare_with.sh REV [CASE ...]: train short runs with this tree and with commit REV on this machine, and compare every
# step's scalars and the final weights bit for bit.
#     bash scripts/compare_with.sh c25c604 offline      # cases: offline, spo, spm, or a single one's name
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need_packages
[ $# -ge 1 ] || { echo "usage: bash scripts/compare_with.sh REV [CASE ...]" >&2; exit 2; }
cd "$ROOT"
commit="$(git rev-parse --verify "$1^{commit}")"; shift
output="$ROOT/output/compare/${commit:0:7}"
mkdir -p "$output"
if [ ! -e "$output/tree/train.py" ]; then
  git worktree prune
  run git worktree add --force --detach "$output/tree" "$commit"
fi
trap 'git worktree remove --force "$output/tree"' EXIT
OMP_NUM_THREADS=1 "$PYTHON" "$ROOT/scripts/compare_runs.py" "$output" "$@"
