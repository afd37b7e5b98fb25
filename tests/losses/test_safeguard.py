"""The safeguard's guarantee as it can be stated: in output space, and on a model whose Jacobian keeps it."""

import pytest
import torch

from losses import LossConfig, denoising_errors, preference_loss, winner_preserving_scale


def test_lambda_against_autograd():
    """The closed form equals the definition: inner products of the two errors' gradients."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(4, 4, 8, 8, generator=generator)
    pred = (target + 0.3 + 0.1 * torch.randn(4, 4, 8, 8, generator=generator)).requires_grad_()
    winner, loser = denoising_errors(pred, target).chunk(2)
    g_w = torch.autograd.grad(winner.mean(), pred, retain_graph=True)[0][:2]
    g_l = torch.autograd.grad(loser.mean(), pred)[0][2:]
    for mu in (0.0, 0.2, 0.6, 0.9, 1.0):
        expected = ((1 - mu) * (g_w * g_w).sum() / ((g_w * g_l).sum() + 1e-9)).clamp(0, 1)
        torch.testing.assert_close(winner_preserving_scale(pred, target, mu), expected)
    assert winner_preserving_scale(pred, target, 1.0) == 0


def test_opposed_gradients_are_left_alone():
    target = torch.zeros(2, 4, 8, 8)
    pred = torch.cat([torch.ones(1, 4, 8, 8), -torch.ones(1, 4, 8, 8)])
    for granularity in ("batch", "sample"):
        assert winner_preserving_scale(pred, target, 1.0, granularity).eq(1).all()


def test_the_lambda_of_a_pair_does_not_depend_on_how_the_batch_is_split():
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(8, 4, 8, 8, generator=generator)
    pred = target + 1.0 + 0.2 * torch.randn(8, 4, 8, 8, generator=generator)
    whole = winner_preserving_scale(pred, target, 0.3, "sample")
    alone = [winner_preserving_scale(pred[[i, i + 4]], target[[i, i + 4]], 0.3, "sample") for i in range(4)]
    assert whole.shape == (4,)
    assert torch.equal(whole, torch.cat(alone))
    halves = [winner_preserving_scale(pred[rows], target[rows], 0.3) for rows in ([0, 1, 4, 5], [2, 3, 6, 7])]
    assert not torch.isclose(halves[0], winner_preserving_scale(pred, target, 0.3))  # a batch's lambda does depend on it


def offset_model(seed=0):
    """A prediction that is an input plus a learned offset shared by winner and loser: J_w J_w^T = J_w J_l^T = identity."""
    generator = torch.Generator().manual_seed(seed)
    winner = torch.randn(1, 4, 8, 8, generator=generator)
    loser = 3.0 * winner + torch.randn(1, 4, 8, 8, generator=generator)  # the gradients agree and the loser's is larger
    inputs, target = torch.cat([winner, loser]).double(), torch.zeros(2, 4, 8, 8).double()
    return inputs, torch.zeros(1, 4, 8, 8).double().requires_grad_(), target


def winner_error_and_slope(mu, seed):
    """The winner's error, its slope along the update direction, and the update direction of the shared offset."""
    inputs, offset, target = offset_model(seed)
    ref = inputs + 0.05
    config = LossConfig(beta=1.0, use_winner_preserving=mu is not None, winner_preserving_mu=mu or 0.0)
    result = preference_loss(inputs + offset, ref, target, config)
    step = -torch.autograd.grad(result.loss, offset)[0]
    error = denoising_errors(inputs + offset, target)[0]
    slope = (torch.autograd.grad((inputs + offset)[:1].square().mean(), offset)[0] * step).sum()
    return inputs, error, slope, step


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9])
def test_the_winners_error_does_not_rise_to_first_order(mu, seed):
    inputs, error, slope, step = winner_error_and_slope(mu, seed)
    rounding = 1e-6 * step.square().sum()
    assert slope <= rounding
    if mu > 0:
        after = denoising_errors(inputs[:1] + 1e-2 / step.abs().max() * step, torch.zeros(1, 4, 8, 8))[0]
        assert after < error


@pytest.mark.parametrize("seed", range(5))
def test_without_the_safeguard_it_rises(seed):
    inputs, error, slope, step = winner_error_and_slope(None, seed)
    after = denoising_errors(inputs[:1] + 1e-2 / step.abs().max() * step, torch.zeros(1, 4, 8, 8))[0]
    assert slope > 0 and after > error
