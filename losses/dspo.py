"""DSPO, direct score preference optimisation (ICLR 2025), in the two forms that are published."""

import torch
from torch import Tensor

SDXL_DISTANCE = 0.1  # the official program's switch between its two SDXL forms


def dspo_loss(margin: Tensor, model_winner: Tensor, ref_winner: Tensor, target_winner: Tensor, beta: float) -> Tensor:
    """SD1.5: mean of ((p_w - target_w) - beta (1 - sigmoid(u)) (p_w - r_w))^2. The gradient flows through u too.

    margin: (B,); the other tensors (B, C, H, W), of the winner alone. The published beta is 0.001.
    """
    weight = beta * (1.0 - torch.sigmoid(margin)).reshape(-1, 1, 1, 1)
    return ((model_winner - target_winner) - weight * (model_winner - ref_winner)).square().mean()


def dspo_sdxl_loss(margin: Tensor, model_winner: Tensor, ref_winner: Tensor) -> Tensor:
    """SDXL: mean of ((1 - sigmoid(u)) d)^2 with d = p_w - r_w where mean(d^2) >= 0.1, else mean of (1 - sigmoid(u))^2.

    margin: (B,); the other tensors (B, C, H, W). The switch looks at this process's batch and stays on the device.
    """
    weight = 1.0 - torch.sigmoid(margin)
    distance = model_winner - ref_winner
    far = (weight.reshape(-1, 1, 1, 1) * distance).square().mean()
    near = weight.square().mean()
    return torch.where(distance.detach().square().mean() >= SDXL_DISTANCE, far, near)
