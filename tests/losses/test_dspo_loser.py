"""DSPO as published for SD1.5: where its loser matters, and where its winner is pulled down."""

import pytest
import torch

from losses import LossConfig, preference_loss


def gradients(beta: float, improved: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the loss with respect to the winners' and the losers' predictions, and the winners' residuals; errors about 0.05.
    improved: the share by which the policy's residuals are smaller than the reference's."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(8, 4, 16, 16, generator=generator)
    residual = 0.05**0.5 * torch.randn(8, 4, 16, 16, generator=generator)
    prediction = (target + (1 - improved) * residual).requires_grad_()
    preference_loss(prediction, target + residual, target, LossConfig(method="dspo", beta=beta)).loss.backward()
    winner, loser = prediction.grad.chunk(2)
    return winner, loser, (prediction - target)[:4].detach()


@pytest.mark.parametrize("beta, lowers", [(0.001, True), (1.0, True), (1.9, True), (2.1, False), (100.0, False), (5000.0, False)])
def test_from_the_reference_on_a_step_lowers_the_winners_error_below_beta_2_alone(beta, lowers):
    winner, loser, residual = gradients(beta, improved=0.0)
    assert ((winner * residual).sum() > 0) == lowers and loser.abs().max() == 0


@pytest.mark.parametrize("beta, at_most", [(0.001, 1e-8), (0.1, 1e-4), (1.0, 1e-2), (1.9, 0.1)])
def test_below_beta_2_the_loser_stays_inert(beta, at_most):
    winner, loser, _ = gradients(beta, improved=0.01)
    assert 0 < loser.norm() < at_most * winner.norm()
