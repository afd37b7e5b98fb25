"""Preference objectives for diffusion models: pure functions of predictions, with no model, accelerator or argument object.

    from losses import LossConfig, preference_loss, winner_preserving_scale
"""

from losses.config import METHODS, LossConfig
from losses.errors import denoising_errors, preference_margin
from losses.kto import kto_loss, kto_reference_point
from losses.preference import PreferenceLoss, preference_loss
from losses.safeguard import parameter_space_scale, scale_gradient, winner_preserving_scale

__all__ = [
    "METHODS", "LossConfig", "PreferenceLoss", "denoising_errors", "kto_loss", "kto_reference_point",
    "parameter_space_scale", "preference_loss", "preference_margin", "scale_gradient", "winner_preserving_scale",
]
