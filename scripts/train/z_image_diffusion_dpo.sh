#!/usr/bin/env bash
# Train with configs/train/z_image_diffusion_dpo.yaml on every GPU of this machine; extra train.py flags win over the preset.
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" z_image_diffusion_dpo "$@"
