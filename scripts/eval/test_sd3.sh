#!/usr/bin/env bash
# test_sd3.sh WEIGHTS [flags]: the prompt groups by an SD3 or SD3.5 model under its published steps and guidance, see test.sh.
# WEIGHTS: a run's folder, a checkpoint, LoRA weights, or "base".
exec bash "$(dirname "${BASH_SOURCE[0]}")/test.sh" sd3 "$@"
