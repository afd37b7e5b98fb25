"""MaPO, margin-aware preference optimisation (arXiv:2406.06424), as in mapo/utils.py:286-301. It has no reference."""

import torch
import torch.nn.functional as F
from torch import Tensor


def mapo_margin(error_w: Tensor, error_l: Tensor, scale: float, timesteps: int) -> Tensor:
    """m = T (f(e_w) - f(e_l)) with f(e) = s e / (exp(s e) - 1): (B,), (B,) -> (B,). About -T s/2 (e_w - e_l).

    In float64 and with expm1: T = 1000 multiplies a small difference of numbers near 1. The official float32 is off by
    2e-3 logits at an error of 0.09, and NaN at an error of 0 or of hundreds.
    """
    x_w, x_l = ((scale * error.double()).clamp(min=1e-9) for error in (error_w, error_l))
    f_w, f_l = (-x * torch.exp(-x) / torch.expm1(-x) for x in (x_w, x_l))  # f with exp(-x) above and below: no overflow
    return (timesteps * (f_w - f_l)).float()


def mapo_loss(error_w: Tensor, margin: Tensor, weight: float) -> Tensor:
    """mean(e_w) - b mean(log sigmoid(m)), supervised training on winners plus the margin's term: (B,), (B,) -> ()."""
    return error_w.mean() - weight * F.logsigmoid(margin).mean()
