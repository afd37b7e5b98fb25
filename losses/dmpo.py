"""DMPO, divergence minimisation preference optimisation (arXiv:2507.07510)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def dmpo_loss(margin: Tensor, alpha: float) -> Tensor:
    """Reverse KL between Bernoulli(sigmoid(u)) and Bernoulli(1 - alpha), mean over pairs: (B,) -> ().

    1 - alpha is clamped to [1e-6, 1 - 1e-6]; the published alpha is 0.01.
    """
    target = min(max(1.0 - alpha, 1e-6), 1.0 - 1e-6)
    p = torch.sigmoid(margin)
    win = p * (F.logsigmoid(margin) - math.log(target))
    # 1 - p and not sigmoid(-margin): past 14 logits it rounds (0.5% of a vanishing gradient), as the published runs did.
    lose = (1.0 - p) * (F.logsigmoid(-margin) - math.log(1.0 - target))
    return (win + lose).mean()
