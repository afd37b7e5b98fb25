#!/usr/bin/env bash
# Train the step-aware preference model of SPO with configs/train/spm_sd3.yaml on every GPU of this machine; extra
# flags of `python -m spo.preference_model.train` win over the preset.
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" spm_sd3 "$@"
