#!/usr/bin/env bash
# The claims as an experiment on the shapes world: claims.md and its pictures in output/claims.
#     bash scripts/reproduce_claims.sh [options of python -m shapes.experiments, such as --parts frontier objectives]
#     bash scripts/reproduce_claims.sh --smoke        # tiny budgets, into output/claims_smoke: does everything run?
#     bash scripts/reproduce_claims.sh --long         # runs of 300 steps of the parts frontier and flow, into output/claims_long
#     bash scripts/reproduce_claims.sh --full         # every part, and then the long runs: hours
# A call that was interrupted continues where it ended.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$ROOT"
need_packages
export OMP_NUM_THREADS=1 # each worker has one core
run "$PYTHON" -m shapes.experiments "$@"
