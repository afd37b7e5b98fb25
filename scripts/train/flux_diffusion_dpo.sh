#!/usr/bin/env bash
# Train with configs/train/flux_diffusion_dpo.yaml on every GPU of this machine; extra train.py flags win over the preset.
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" flux_diffusion_dpo "$@"
