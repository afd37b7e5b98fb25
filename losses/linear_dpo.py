"""Linear-DPO (arXiv:2605.21123), as in the authors' train/train_sd_dpo.py:1162-1166."""

from torch import Tensor


def linear_dpo_weight(margin: Tensor, eta: float) -> Tensor:
    """c = clamp(0.5 - 0.4 u, eta, 1 - eta), without gradient: (B,) -> (B,). The reference enters here only."""
    return (0.5 - 0.4 * margin.detach()).clamp(eta, 1.0 - eta)


def linear_dpo_loss(margin: Tensor, error_w: Tensor, error_l: Tensor, eta: float) -> Tensor:
    """c (e_w - e_l), mean over pairs: (B,), (B,), (B,) -> (). Published beta: 100 for SD1.5, 500 for SDXL.

    Its gradient is 4e-4 of Diffusion-DPO's at beta 5000, so it wants the learning rates of supervised training. While c
    is near 1/2, as it stays at beta 100, nothing keeps the loser's error from growing: use the safeguard.
    """
    return (linear_dpo_weight(margin, eta) * (error_w - error_l)).mean()
