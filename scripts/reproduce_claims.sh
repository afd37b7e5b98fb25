#!/usr/bin/env bash
# The published claims as an experiment on the shapes world: claims.md, claims.html and plots in output/claims.
#     bash scripts/reproduce_claims.sh [options of shapes/claims.py, such as --seeds 5]
#     bash scripts/reproduce_claims.sh --smoke        # one seed and tiny budgets, into output/claims_smoke
# A broken-off call goes on where it ended.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/python ] && export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=1 # each worker has one core

output=output/claims
for argument in "$@"; do
    [ "$argument" = --smoke ] && output=output/claims_smoke
done
set -x
python -m shapes.claims --output "$output" "$@"
