#!/usr/bin/env bash
# test_z_image.sh WEIGHTS [flags]: the prompt groups by a Z-Image model under its published steps and guidance, see test.sh.
# WEIGHTS: a run's folder, a checkpoint, LoRA weights, or "base".
exec bash "$(dirname "${BASH_SOURCE[0]}")/test.sh" z_image "$@"
