#!/usr/bin/env bash
# test.sh [pytest arguments]: make .venv, install, run the tests. A second run skips what is done.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_venv requirements-dev.txt

# The report's tests click in a real browser.
if ! command -v chromium >/dev/null && ! command -v google-chrome >/dev/null && ! command -v chromium-browser >/dev/null \
   && ! ls "$HOME"/.cache/ms-playwright/chromium*/ >/dev/null 2>&1; then
  say "Installing Chromium for the report's tests"
  if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null
  else
    "$PYTHON" -m playwright install chromium
  fi
fi

cd "$ROOT"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
unset PYTHONDONTWRITEBYTECODE  # dozens of processes import the same files
workers="$("$PYTHON" -c 'import os; print(min(4, 1 + (os.cpu_count() or 1)))')"  # one more than cores: many wait for processes
run "$PYTHON" -m pytest -n "$workers" --dist worksteal "$@"
