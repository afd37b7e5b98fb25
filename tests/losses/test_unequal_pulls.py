"""The safeguard where an objective pulls at a winner and its loser with different strength: the rule and its guarantee.

On the offset model, per pair: a winner's and its loser's prediction share an offset, so that an update moves both alike.
"""

import pytest
import torch

from losses import LossConfig, preference_loss, winner_preserving_scale
from losses.objectives import OBJECTIVES

PAIRS = 8
SETTINGS = {  # the safeguard holds for each; beta 1, errors near 1 to 10
    "diffusion-dpo": {}, "mapo": {}, "poly-dpo": {"poly_alpha": 8.0}, "poly-dpo reversed": {"poly_alpha": -1.0},
    "linear-dpo": {}, "ipo": {"ipo_target": 0.5}, "ipo far": {"ipo_target": 50.0}, "dpop": {"dpop_penalty": 10.0},
    "kto": {"kto_liked_weight": 1.0}, "kto disliked": {"kto_liked_weight": 0.4}, "kto liked": {"kto_liked_weight": 1.6},
    "ipo and winner": {"winner_error_weight": 0.3}, "kto and winner": {"winner_error_weight": 0.3},
}


def offset_model(seed):
    """Inputs, the reference's predictions and target (2B, C, H, W): pairs whose gradients agree, those with the larger
    loser, then those with the larger winner, and one pair whose gradients are opposed."""
    generator = torch.Generator().manual_seed(seed)
    base, noise = torch.randn(2, PAIRS, 4, 8, 8, generator=generator)
    winner_size = torch.tensor([1.0, 1.0, 1.0, 1.0, 3.0, 3.0, 2.0, 1.0]).view(-1, 1, 1, 1)
    loser_size = torch.tensor([6.0, 3.0, 1.1, 1.0, 1.0, 2.0, 1.9, -2.0]).view(-1, 1, 1, 1)
    inputs = torch.cat([winner_size * base, loser_size * base + 0.1 * noise])
    drift = 1 + 0.03 * torch.randn(2 * PAIRS, 1, 1, 1, generator=generator)
    return inputs, drift * inputs, torch.zeros_like(inputs)


def slopes(name, seed, mu=None, loser_scale=None):
    """The slope of each pair's winner's error along the update (B,), and the result."""
    inputs, ref, target = offset_model(seed)
    offset = torch.zeros(PAIRS, 4, 8, 8, requires_grad=True)
    config = LossConfig(name.split()[0], beta=1.0, use_winner_preserving=mu is not None, winner_preserving_mu=mu or 0.0,
                        winner_preserving_granularity="sample", **SETTINGS[name])
    result = preference_loss(inputs + offset.repeat(2, 1, 1, 1), ref, target, config, loser_scale)
    step = -torch.autograd.grad(result.loss, offset)[0].double().flatten(1)
    winner_gradient = 2 * inputs[:PAIRS].double().flatten(1) / step.shape[1]
    return (winner_gradient * step).sum(1), result


def test_all_objectives_that_look_at_errors_alone_are_here():
    assert {name.split()[0] for name in SETTINGS} == set(OBJECTIVES) - {"dspo", "dmpo"}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("name", SETTINGS)
def test_no_winners_error_rises_to_first_order(name, mu, seed):
    slope, result = slopes(name, seed, mu)
    alone, _ = slopes(name, seed, loser_scale=0.0)  # what the pull at the winner does
    raised = alone > 0  # by the objective itself, whatever the loser does
    assert (slope <= (1e-6 - mu) * alone.abs())[~raised].all()
    assert (result.winner_scale.expand(PAIRS)[raised] == 1).all()
    if name == "ipo":
        assert torch.equal(raised, result.margin > 0.5)
    elif name != "ipo and winner":
        assert not raised.any()


@pytest.mark.parametrize("name", SETTINGS)
def test_without_the_safeguard_some_rise(name):
    slope, alone = slopes(name, 0)[0], slopes(name, 0, loser_scale=0.0)[0]
    assert ((slope > 0.1 * alone.abs()) & (alone <= 0)).any()


@pytest.mark.parametrize("name", ["mapo", "kto disliked"])
def test_lambda_for_equal_pulls_would_not_do(name):
    """Why the rule is there: with DPO's lambda the winner's error of some pairs rises."""
    inputs, _, target = offset_model(0)
    lambda_of_dpo = winner_preserving_scale(inputs, target, 0.0, "sample")
    slope, alone = slopes(name, 0, loser_scale=lambda_of_dpo)[0], slopes(name, 0, loser_scale=0.0)[0]
    assert (slope > 0.1 * alone.abs()).any()


def scale(pull_w, pull_l, granularity="sample", loser=2.0, mu=0.5):
    """lambda of one pair whose gradients have <g_w, g_w> / <g_w, g_l> = 1 / loser."""
    pred = torch.cat([torch.ones(1, 4, 8, 8), torch.full((1, 4, 8, 8), loser)])
    pulls = torch.tensor([pull_w]), torch.tensor([pull_l])
    return winner_preserving_scale(pred, torch.zeros_like(pred), mu, granularity, pulls).item()


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_the_rule(granularity):
    pred = torch.cat([torch.ones(1, 4, 8, 8), torch.full((1, 4, 8, 8), 2.0)])
    plain = winner_preserving_scale(pred, torch.zeros_like(pred), 0.5, granularity).item()
    assert plain == pytest.approx(0.25, rel=1e-5)
    assert scale(1.0, 1.0, granularity) == plain  # equal pulls
    assert scale(3.0, 1.0, granularity) == plain  # a winner that is pulled harder: the bound holds as it is
    assert scale(1.0, 0.0, granularity) == plain
    assert scale(1.0, 4.0, granularity) == pytest.approx(plain / 4)
    assert scale(0.0, 1.0, granularity) == 0
    assert scale(-1.0, 1.0, granularity) == 1  # the objective raises the winner's error itself
    assert scale(-1.0, -1.0, granularity) == 1
    assert scale(1.0, 4.0, granularity, loser=-2.0) == 1  # the loser's push is the winner's gain
    assert scale(1.0, -4.0, granularity) == 1  # and so is a loser's pull
    assert scale(1.0, -4.0, granularity, loser=-2.0) == pytest.approx(plain / 4)
    assert scale(1.0, 1.5, granularity, loser=0.5, mu=0.0) == 1  # multiplied before the clamp, not after
    assert scale(1.0, 4.0, granularity, loser=0.5, mu=0.0) == pytest.approx(0.5)
