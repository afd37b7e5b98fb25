#!/usr/bin/env bash
# torture.sh [--kills 50] [--short] [--seed 0]: kill training runs with SIGKILL at random moments, damage their
# checkpoints, fill their disk; each must end bit for bit as the unbroken run. Prints figures; exits 1 where one fails.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run "$PYTHON" "$ROOT/tests/torture.py" "$@"
