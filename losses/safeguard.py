"""The winner-preserving safeguard of Diffusion-SDPO (arXiv:2511.03317): scale the loser's gradient."""

import torch
from torch import Tensor

EPSILON = 1e-9  # the official implementation's; it is added to an inner product of order 1/N, so it does shift lambda


@torch.no_grad()
def winner_preserving_scale(model_pred: Tensor, target: Tensor, mu: float, granularity: str = "batch",
                            pulls: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """lambda, the factor in [0, 1] on the loser's gradient that keeps the winner's error from rising to first order.

    model_pred, target: (2B, C, H, W), winners first. mu: in [0, 1], larger is more conservative.
    granularity: "batch" gives one lambda, shape (), from gradients of errors averaged over the local batch (official);
    "sample" gives (B,), each pair's from that pair's errors alone, so that it does not depend on how a batch is split.

    With g_w and g_l the gradients of the mean squared errors A and B with respect to the winner's and the loser's
    predictions:  lambda = clamp((1 - mu) <g_w, g_w> / (<g_w, g_l> + 1e-9), 0, 1)  if <g_w, g_l> > 0, else 1.
    Along -(g_w - lambda g_l) the winner's error then changes by at most -mu <g_w, g_w> to first order, in output space.

    pulls: a_w = dL/de_w and a_l = -dL/de_l, two (B,), of an objective that weighs the two errors differently: an update
    follows -(a_w g_w - lambda a_l g_l). lambda is then (B,) in either granularity: as above where a_w >= a_l >= 0,
    elsewhere multiplied by a_w / a_l before the clamp, and 1 where a_w < 0, where the loss itself pushes the winner up.
    """
    residual = (model_pred.float() - target.float()).flatten(1)
    winner, loser = residual.chunk(2)
    if granularity == "batch":
        winner, loser = winner.reshape(1, -1), loser.reshape(1, -1)
    gradient_scale = 2.0 / winner.shape[1]  # d mean(r^2) / dr = 2 r / N
    winner, loser = winner * gradient_scale, loser * gradient_scale
    winner_dot_winner = (winner * winner).sum(dim=1)
    winner_dot_loser = (winner * loser).sum(dim=1)
    bound = (1.0 - mu) * winner_dot_winner / (winner_dot_loser + EPSILON)
    if pulls is not None:
        return _scale_of_unequal_pulls(bound, winner_dot_loser, *pulls)
    scale = torch.where(winner_dot_loser > 0, bound.clamp(0.0, 1.0), torch.ones_like(bound))
    return scale.squeeze(0) if granularity == "batch" else scale


def _scale_of_unequal_pulls(bound: Tensor, winner_dot_loser: Tensor, pull_w: Tensor, pull_l: Tensor) -> Tensor:
    """lambda (B,) from the bound for equal pulls. A loser pulled down, a_l < 0, opposes where <g_w, g_l> < 0."""
    holds = (pull_w >= pull_l) & (pull_l >= 0)
    scale = torch.where(holds, bound, bound * (pull_w / pull_l)).clamp(0.0, 1.0)
    opposed = torch.where(pull_l >= 0, winner_dot_loser > 0, winner_dot_loser < 0)
    return torch.where(opposed & (pull_w >= 0), scale, torch.ones_like(scale))


@torch.no_grad()
def parameter_space_scale(through_winners: list[Tensor], through_losers: list[Tensor], mu: float) -> Tensor:
    """lambda () from the parameters' gradients of the loss through the winners, G_w, and through the losers, G_l.

    lambda = clamp((1 - mu) <G_w, G_w> / -<G_w, G_l>, 0, 1)  if <G_w, G_l> < 0, else 1. A step along -(G_w + lambda G_l)
    lowers what a step along -G_w lowers, by mu <G_w, G_w> or more to first order. The lists have the same shapes.
    """
    winner_dot_winner = sum((winner * winner).sum() for winner in through_winners)
    opposition = -sum((winner * loser).sum() for winner, loser in zip(through_winners, through_losers))
    scale = ((1.0 - mu) * winner_dot_winner / opposition).clamp(0.0, 1.0)
    return torch.where(opposition > 0, scale, torch.ones_like(scale))


def scale_gradient(value: Tensor, scale: Tensor | float) -> Tensor:
    """`value` unchanged, its gradient multiplied by `scale`. The subtraction is exact: equal floats give 0."""
    return value.detach() + scale * (value - value.detach())
