#!/usr/bin/env bash
# SPO beside the offline methods at equal time on the shapes world: spo.md and spo.png in output/spo.
#     bash scripts/compare_spo.sh [options of shapes/spo_comparison.py, such as --seconds 60]
#     bash scripts/compare_spo.sh --smoke        # tiny budgets, into output/spo_smoke
# A call that was interrupted continues where it ended.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$ROOT"
need_packages
export OMP_NUM_THREADS=1 # each worker has one core
run "$PYTHON" -m shapes.spo_comparison "$@"
