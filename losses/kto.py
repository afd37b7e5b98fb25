"""Diffusion-KTO (arXiv:2404.04465), as in the authors' train_kto_sd_v1.5.py:1451-1509: images liked or disliked."""

import torch
from torch import Tensor


def kto_reference_point(gain: Tensor) -> Tensor:
    """z = max(0, mean g), without gradient: (N,) -> (). The published mean is over the images of all processes."""
    return gain.detach().mean().clamp(min=0.0)


def kto_logits(gain: Tensor, liked: Tensor, beta: float, z: Tensor | float) -> Tensor:
    """m = s beta (g - z) with s = 1 for a liked image and -1 for a disliked one: (N,), (N,) bool -> (N,)."""
    return torch.where(liked, beta * (gain - z), -beta * (gain - z))


def kto_loss(gain: Tensor, liked: Tensor, beta: float, z: Tensor | float, liked_weight: float = 1.0) -> Tensor:
    """w_y sigmoid(-m), mean over IMAGES: (N,), (N,) bool -> (). 1/2 where policy and reference are equal and w = 1.

    gain: g = r - e, the reference's error less the policy's. Liked images weigh w, disliked ones 2 - w.
    Written 1 - sigmoid(m), as in the official code, float32 loses the gradient past 15 logits.
    """
    weight = torch.where(liked, liked_weight, 2.0 - liked_weight)
    return (weight * torch.sigmoid(-kto_logits(gain, liked, beta, z))).mean()


def pair_gains(error_w: Tensor, error_l: Tensor, ref_error_w: Tensor, ref_error_l: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs as single images, winners first: four (B,) -> the gains (2B,), and which are liked (2B,)."""
    gain = torch.cat([ref_error_w - error_w, ref_error_l - error_l])
    return gain, torch.arange(len(gain), device=gain.device) < len(error_w)
