"""The further objectives: closed forms, derivatives, settings, logs, and KTO on single images and several processes."""

import math

import pytest
import torch

from losses import LossConfig, METHODS, denoising_errors, kto_loss, kto_reference_point, preference_loss
from losses.linear_dpo import linear_dpo_weight
from losses.mapo import mapo_margin
from losses.objectives import OBJECTIVES
from losses.poly_dpo import poly_dpo_loss

LOG_2 = torch.log(torch.tensor(2.0))


def random_batch(pairs=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target, noise, drift = torch.randn(3, 2 * pairs, 4, 8, 8, generator=generator)
    return target + 0.3 * noise, target + 0.3 * noise + 0.01 * drift, target


def test_every_method_but_sft_is_in_the_table():
    assert set(OBJECTIVES) == set(METHODS) - {"sft"}
    assert [method for method in METHODS if not LossConfig(method).needs_reference] == ["sft", "mapo"]


@pytest.mark.parametrize("field, values", {
    "mapo_weight": [-0.1, math.nan, math.inf], "mapo_scale": [0.0, -1.0, math.nan], "mapo_timesteps": [0, -1],
    "poly_alpha": [-1.01, math.nan, math.inf], "linear_eta": [-1e-3, 0.51, math.nan], "ipo_target": [0.0, -0.5],
    "dpop_penalty": [-1.0, math.nan], "kto_liked_weight": [-0.1, 2.1, math.nan],
    "winner_error_weight": [-1.0, math.inf],
}.items())
def test_a_value_out_of_range_names_its_field(field, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{field} "):
            LossConfig(**{field: value})


def test_the_ends_of_the_ranges_are_allowed():
    LossConfig(mapo_weight=0, mapo_timesteps=1, poly_alpha=-1, linear_eta=0.5, dpop_penalty=0, kto_liked_weight=2)
    LossConfig(linear_eta=0, kto_liked_weight=0, winner_error_weight=0)


def start(**settings):
    """The loss where policy and reference are equal, and the policy's errors."""
    pred, _, target = random_batch()
    return preference_loss(pred, pred.clone(), target, LossConfig(**settings)).loss, denoising_errors(pred, target)


def test_closed_forms_at_the_start_to_the_last_bit():
    assert start(method="poly-dpo", poly_alpha=8.0)[0] == LOG_2 + 4.0
    assert start(method="poly-dpo", poly_alpha=0.0)[0] == LOG_2
    assert start(method="ipo", ipo_target=0.5)[0] == 0.25
    assert start(method="dpop", dpop_penalty=50.0)[0] == LOG_2
    assert start(method="kto")[0] == 0.5
    loss, errors = start(method="linear-dpo")
    winner, loser = errors.chunk(2)
    assert loss == ((winner - loser) / 2).mean()


def test_poly_dpo_with_alpha_0_and_dpop_without_penalty_are_diffusion_dpo():
    pred, ref, target = random_batch()
    expected = preference_loss(pred, ref, target, LossConfig()).loss
    assert preference_loss(pred, ref, target, LossConfig(method="poly-dpo", poly_alpha=0.0)).loss == expected
    assert preference_loss(pred, ref, target, LossConfig(method="dpop", dpop_penalty=0.0)).loss == expected


@pytest.mark.parametrize("alpha", [-1.0, -0.5, 0.0, 8.0])
def test_poly_dpo_never_pulls_a_pair_the_wrong_way(alpha):
    margin = torch.linspace(-30, 30, 61).requires_grad_()
    (slope,) = torch.autograd.grad(poly_dpo_loss(margin, alpha), margin)
    p = torch.sigmoid(margin.detach())
    torch.testing.assert_close(slope * 61, -torch.sigmoid(-margin.detach()) * (1 + alpha * p), rtol=1e-4, atol=1e-6)
    assert slope.max() <= 1e-9  # rounding


def test_linear_dpo_weight_is_clamped_and_carries_no_gradient():
    margin = torch.tensor([-10.0, -0.5, 0.0, 0.5, 10.0], requires_grad=True)
    weight = linear_dpo_weight(margin, 0.01)
    assert not weight.requires_grad
    torch.testing.assert_close(weight, torch.tensor([0.99, 0.7, 0.5, 0.3, 0.01]))


def test_dpop_is_diffusion_dpo_where_no_winner_got_worse():
    pred, _, target = random_batch()
    worse, better = target + 1.1 * (pred - target), target + 0.9 * (pred - target)  # than ref = pred
    for policy, penalised in ((better, False), (worse, True)):
        plain = preference_loss(policy, pred, target, LossConfig(beta=10.0)).loss
        dpop = preference_loss(policy, pred, target, LossConfig(method="dpop", beta=10.0, dpop_penalty=5.0)).loss
        assert (dpop > plain) if penalised else (dpop == plain)


def test_mapo_needs_no_reference_and_does_not_look_at_one_or_at_beta():
    pred, ref, target = random_batch()
    results = [preference_loss(pred, given, target, LossConfig(method="mapo", beta=beta))
               for given, beta in ((None, 5000.0), (ref, 1.0))]
    assert results[0].loss == results[1].loss
    logs = results[0].logs
    assert not {"ref_mse_unaccumulated", "avg_win_diff_loss", "avg_lose_diff_loss"} & set(logs)
    winner, loser = denoising_errors(pred, target).chunk(2)
    torch.testing.assert_close(logs["margin_mean"], mapo_margin(winner, loser, 0.5, 1000).mean())
    torch.testing.assert_close(logs["implicit_acc_accumulated"], (winner < loser).float().mean())
    torch.testing.assert_close(results[0].margin, -250 * (winner - loser), rtol=0.1, atol=0)


@pytest.mark.parametrize("error", [0.0, 1e-12, 1e-6, 0.09, 1.0, 100.0, 1e4])
def test_mapo_is_finite_for_every_error_with_the_right_slope(error):
    winner = torch.tensor([error], requires_grad=True)
    margin = mapo_margin(winner, torch.ones(1), 0.5, 1000)
    (slope,) = torch.autograd.grad(margin, winner)
    assert margin.isfinite() and slope.isfinite() and slope <= 0
    if 1e-6 <= error <= 1:  # f'(e) = s (1/2 (coth y - y / sinh^2 y) - 1/2) with y = s e / 2, and its series for small y
        y = 0.25 * error
        coth = y / 3 * 2 if y < 1e-3 else 1 / math.tanh(y) - y / math.sinh(y) ** 2
        torch.testing.assert_close(slope.item(), 500 * (coth / 2 - 0.5), rtol=1e-5, atol=0)


def test_the_methods_with_a_reference_refuse_to_go_without():
    pred, _, target = random_batch()
    for method in METHODS:
        if LossConfig(method).needs_reference:
            with pytest.raises(ValueError, match="reference"):
                preference_loss(pred, None, target, LossConfig(method))


@pytest.mark.parametrize("method", OBJECTIVES)
def test_winner_error_weight_adds_the_winners_error(method):
    pred, ref, target = random_batch()
    gradients, losses = [], []
    for weight in (0.0, 3.0):
        leaf = pred.clone().requires_grad_()
        loss = preference_loss(leaf, ref, target, LossConfig(method, winner_error_weight=weight)).loss
        gradients.append(torch.autograd.grad(loss, leaf)[0])
        losses.append(loss)
    winner = denoising_errors(pred, target)[:4].mean()
    torch.testing.assert_close(losses[1], losses[0] + 3 * winner)
    expected = torch.zeros_like(pred)
    expected[:4] = 3 * 2 * (pred - target)[:4] / pred[:4].numel()
    torch.testing.assert_close(gradients[1], gradients[0] + expected)


def test_kto_takes_single_images_without_pairs():
    gain = torch.tensor([0.1, -0.2, 0.3], requires_grad=True)
    liked = torch.tensor([True, False, True])
    z = kto_reference_point(gain)
    loss = kto_loss(gain, liked, beta=10.0, z=z, liked_weight=1.6)
    sigmoid = [1 / (1 + math.exp(-sign * 10 * (g - 0.2 / 3))) for g, sign in ((0.1, 1), (-0.2, -1), (0.3, 1))]
    assert not z.requires_grad
    assert loss.item() == pytest.approx((1.6 * (1 - sigmoid[0]) + 0.4 * (1 - sigmoid[1]) + 1.6 * (1 - sigmoid[2])) / 3)
    assert kto_reference_point(-gain.abs()) == 0


def test_kto_keeps_the_gradient_of_images_that_are_far_right():
    gain = torch.tensor([20.0, 40.0], requires_grad=True)
    (slope,) = torch.autograd.grad(kto_loss(gain, torch.tensor([True, True]), 1.0, 0.0), gain)
    torch.testing.assert_close(slope, -torch.exp(-gain.detach()) / 2, rtol=1e-5, atol=0)


def test_kto_on_pairs_is_kto_on_their_images():
    pred, ref, target = random_batch()
    gain = denoising_errors(ref, target) - denoising_errors(pred, target)
    liked = torch.arange(8) < 4
    config = LossConfig("kto", beta=100.0, kto_liked_weight=1.6)
    expected = kto_loss(gain, liked, 100.0, kto_reference_point(gain), 1.6)
    assert preference_loss(pred, ref, target, config).loss == expected


def test_two_processes_that_share_z_compute_the_loss_of_one():
    pred, ref, target = random_batch()
    config = LossConfig("kto", beta=100.0)
    whole = preference_loss(pred, ref, target, config)
    halves = [[0, 1, 4, 5], [2, 3, 6, 7]]
    gains = [denoising_errors(ref[half], target[half]) - denoising_errors(pred[half], target[half]) for half in halves]
    calls = []

    def gathered(gain):
        calls.append(gain)
        return kto_reference_point(torch.cat(gains))

    config_safe = LossConfig("kto", beta=100.0, use_winner_preserving=True)
    split = [preference_loss(pred[half], ref[half], target[half], config_safe, kto_z=gathered) for half in halves]
    torch.testing.assert_close((split[0].loss + split[1].loss) / 2, whole.loss)
    assert len(calls) == 2  # once a call: a function that communicates must run equally often everywhere
    assert all(torch.equal(call, gain) and not call.requires_grad for call, gain in zip(calls, gains))
    given = preference_loss(pred[halves[0]], ref[halves[0]], target[halves[0]], config, kto_z=gathered(gains[0]))
    assert given.loss == split[0].loss
