"""IPO, identity preference optimisation (arXiv:2310.12036), as in diffusers' train_diffusion_dpo.py:878-885."""

from torch import Tensor


def ipo_loss(margin: Tensor, target: float) -> Tensor:
    """(u - t)^2, mean over pairs: (B,) -> (). t^2 where policy and reference are equal.

    diffusers' loss is 4 / beta^2 times this one with t = 1/2, a gradient so small that Adam's epsilon swallows it.
    Past the target the loss pulls the margin back: it raises the winner's error and lowers the loser's.
    """
    return (margin - target).square().mean()
