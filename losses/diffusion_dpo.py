"""Diffusion-DPO (arXiv:2311.12908), Eq. 14."""

import torch.nn.functional as F
from torch import Tensor


def diffusion_dpo_loss(margin: Tensor) -> Tensor:
    """-log sigmoid(u), averaged after the logsigmoid: (B,) -> (). log 2 where policy and reference are equal."""
    return -F.logsigmoid(margin).mean()
