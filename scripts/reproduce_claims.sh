#!/usr/bin/env bash
# The published claims as an experiment on the shapes world: claims.md, claims.html and plots in output/claims.
#     bash scripts/reproduce_claims.sh [options of shapes/claims.py, such as --seeds 5]
#     bash scripts/reproduce_claims.sh --smoke        # one seed and tiny budgets, into output/claims_smoke
# A call that was interrupted continues where it ended.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$ROOT"
need_packages
export OMP_NUM_THREADS=1 # each worker has one core

output=output/claims
for argument in "$@"; do
  if [ "$argument" = --smoke ]; then output=output/claims_smoke; fi
done
run "$PYTHON" -m shapes.claims --output "$output" "$@"
