"""DSPO as published for SD1.5 has no beta at which its loser matters and its winner is still pulled down."""

import pytest
import torch

from losses import LossConfig, preference_loss

IMPROVED = 0.01  # share by which the winners' residuals are already smaller than the reference's


def gradients(beta: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the loss with respect to the winners' and the losers' predictions, and the winners' residuals; errors about 0.05."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(8, 4, 16, 16, generator=generator)
    residual = 0.05**0.5 * torch.randn(8, 4, 16, 16, generator=generator)
    prediction = (target + (1 - IMPROVED) * residual).requires_grad_()
    preference_loss(prediction, target + residual, target, LossConfig(method="dspo", beta=beta)).loss.backward()
    winner, loser = prediction.grad.chunk(2)
    return winner, loser, (prediction - target)[:4].detach()


@pytest.mark.parametrize("beta, lowers, at_most", [(0.001, True, 1e-8), (0.1, True, 1e-4), (1.0, True, 1e-2), (1.9, True, 0.1),
                                                   (2.1, False, None), (100.0, False, None), (5000.0, False, None)])
def test_below_beta_2_the_loser_is_inert_and_above_it_the_winner_is_pushed_up(beta, lowers, at_most):
    winner, loser, residual = gradients(beta)
    assert ((winner * residual).sum() > 0) == lowers  # whether a step lowers the winners' error
    if lowers:
        assert loser.norm() < at_most * winner.norm()
