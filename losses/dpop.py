"""DPOP, DPO-positive (Smaug, arXiv:2402.13228), carried over from language models; no diffusion code is published."""

import torch.nn.functional as F
from torch import Tensor


def dpop_logits(margin: Tensor, error_w: Tensor, ref_error_w: Tensor, beta: float, penalty: float) -> Tensor:
    """u' = u - beta/2 k max(0, e_w - r_w): the margin, less a penalty where the winner is worse than the
    reference's. The loss is Diffusion-DPO's of u'.

    All (B,) -> (B,). Equal to u, gradient included, where policy and reference are equal.
    """
    return margin - 0.5 * beta * penalty * F.relu(error_w - ref_error_w)
