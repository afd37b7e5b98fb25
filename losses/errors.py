"""Denoising errors and the preference margin, in float32 whatever the predictions' dtype.

In bf16 the errors' rounding alone gives the margin of two identical models a standard deviation of half a logit to five
logits at beta 5000, as large as the signal; in float32 that margin is exactly 0.
"""

import torch
from torch import Tensor


def denoising_errors(pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample over channels and pixels: (N, C, H, W), (N, C, H, W) -> (N,) float32."""
    return (pred.float() - target.float()).square().flatten(1).mean(dim=1)


def preference_margin(model_winner: Tensor, model_loser: Tensor, ref_winner: Tensor, ref_loser: Tensor,
                      beta: float) -> Tensor:
    """The margin u of each pair in logits, from four (B,) tensors of errors -> (B,).

    u = -beta/2 * [(e_theta^w - e_theta^l) - (e_ref^w - e_ref^l)], Eq. 14 of Diffusion-DPO (arXiv:2311.12908) with
    T * omega(lambda_t) absorbed into beta, and the 1/2 and the mean over pixels of the public code.
    """
    return -0.5 * beta * ((model_winner - model_loser) - (ref_winner - ref_loser))


def implicit_accuracy(margin: Tensor) -> Tensor:
    """Share of pairs that the policy, relative to the reference, ranks as labelled; an exact tie counts one half."""
    return 0.5 * (1.0 + torch.sign(margin)).mean()
