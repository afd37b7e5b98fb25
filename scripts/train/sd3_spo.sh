#!/usr/bin/env bash
# Train with configs/train/sd3_spo.yaml on every GPU of this machine; extra train.py flags win over the preset.
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" sd3_spo "$@"
