"""Poly-DPO (ViPO, arXiv:2604.24953): the formula of the project's page, whose code is not public."""

import torch
import torch.nn.functional as F
from torch import Tensor


def poly_dpo_loss(margin: Tensor, alpha: float) -> Tensor:
    """-log sigmoid(u) + alpha (1 - sigmoid(u)), mean over pairs: (B,) -> (). alpha = 0 is Diffusion-DPO.

    dL/du = -(1 - p)(1 + alpha p) with p = sigmoid(u): alpha > 0 strengthens undecided pairs, alpha < -1 would reverse
    pairs that the policy has right. log 2 + alpha / 2 where policy and reference are equal.
    """
    return (-F.logsigmoid(margin) + alpha * torch.sigmoid(-margin)).mean()
