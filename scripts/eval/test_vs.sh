#!/usr/bin/env bash
# test_vs.sh --json_a A.json --json_b B.json --label_a "A" --label_b "B" [--device cuda|cpu] [--batch_size 64]
#            [--outdir output/vs_eval] [other eval.compare flags]: win rates of A over B and a page to look at.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
need_packages
first_start "the five metrics (14 GB)" "$@"
run "$PYTHON" -m eval.compare "$@"
