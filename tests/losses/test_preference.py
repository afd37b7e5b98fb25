import math

import pytest
import torch

from losses import LossConfig, METHODS, preference_loss

PREFERENCE_METHODS = [method for method in METHODS if method != "sft"]


def random_batch(pairs=2, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2 * pairs, 4, 8, 8, generator=generator).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("field, value", [
    ("method", "dpo"), ("beta", -1.0), ("beta", 0.0), ("beta", float("nan")), ("beta", float("inf")),
    ("dmpo_alpha", 1.0), ("dmpo_alpha", -0.1), ("dmpo_alpha", float("nan")), ("winner_preserving_mu", 1.01),
    ("winner_preserving_mu", -0.01), ("winner_preserving_granularity", "pixel")])
def test_a_value_out_of_range_names_its_field(field, value):
    with pytest.raises(ValueError, match=field):
        LossConfig(**{field: value})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_identical_models_give_the_closed_form_to_the_last_bit(dtype):
    pred, _, target = random_batch(dtype=dtype)
    target = target.float()
    result = preference_loss(pred, pred.clone(), target, LossConfig())
    assert result.margin.abs().max() == 0
    assert result.loss.dtype == torch.float32
    assert result.loss == torch.log(torch.tensor(2.0))
    assert result.logs["implicit_acc_accumulated"] == 0.5

    alpha = 0.01
    dmpo = preference_loss(pred, pred.clone(), target, LossConfig(method="dmpo", dmpo_alpha=alpha)).loss
    expected = 0.5 * (math.log(0.5 / (1 - alpha)) + math.log(0.5 / alpha))
    assert dmpo.item() == pytest.approx(expected, rel=1e-6)
    dspo = preference_loss(pred, pred.clone(), target, LossConfig(method="dspo", beta=0.001)).loss
    assert dspo.item() == pytest.approx((pred.float() - target)[:2].square().mean().item(), rel=1e-6)


@pytest.mark.parametrize("method", PREFERENCE_METHODS)
def test_the_safeguard_leaves_the_value_and_shrinks_only_the_losers_gradient(method):
    pred, ref, target = random_batch()
    pred[2:] = pred[:2] + 0.1 * pred[2:]  # winner and loser gradients agree, so lambda is below 1
    target[2:] = target[:2]
    values, gradients = [], []
    for use in (False, True):
        leaf = pred.clone().requires_grad_()
        config = LossConfig(method=method, beta=2.0, use_winner_preserving=use, winner_preserving_mu=0.5)
        result = preference_loss(leaf, ref, target, config)
        result.loss.backward()
        values.append(result.loss.item())
        gradients.append(leaf.grad)
    scale = result.winner_scale.expand(2).reshape(-1, 1, 1, 1)
    assert scale.min() > 0.3 and scale.max() < 0.7
    assert values[0] == values[1]
    torch.testing.assert_close(gradients[1][:2], gradients[0][:2], rtol=0, atol=0)
    torch.testing.assert_close(gradients[1][2:], scale * gradients[0][2:])


def test_the_mean_is_taken_after_the_logsigmoid():
    """The logsigmoid of the mean margin is a known bug of another script (huggingface/diffusers issue 6702)."""
    pred, ref, target = random_batch(pairs=8)
    result = preference_loss(pred, ref, target, LossConfig(beta=50.0))
    after = torch.nn.functional.softplus(-result.margin).mean()
    before = torch.nn.functional.softplus(-result.margin.mean())
    torch.testing.assert_close(result.loss, after)
    assert abs(after - before) > 0.1


@pytest.mark.parametrize("method", PREFERENCE_METHODS)
@pytest.mark.parametrize("sdxl", [False, True])
def test_huge_margins_stay_finite(method, sdxl):
    for sign in (1, -1):
        pred, ref, target = random_batch()
        pred[:2] = target[:2] + (10 if sign < 0 else 0)
        leaf = pred.requires_grad_()
        result = preference_loss(leaf, ref, target, LossConfig(method=method, beta=1e6, sdxl=sdxl))
        result.loss.backward()
        assert torch.isfinite(result.loss) and torch.isfinite(leaf.grad).all()


def test_dspo_sdxl_switches_form_at_a_mean_square_distance_of_a_tenth():
    _, ref, target = random_batch()
    for distance, scaled in ((0.3, False), (0.4, True)):
        pred = ref + distance
        result = preference_loss(pred, ref, target, LossConfig(method="dspo", beta=1.0, sdxl=True))
        weight = (1 - torch.sigmoid(result.margin)).square().mean()
        torch.testing.assert_close(result.loss, weight * distance**2 if scaled else weight)


def test_sft_is_the_winners_error_and_needs_no_reference():
    pred, _, target = random_batch()
    result = preference_loss(pred, None, target, LossConfig(method="sft"))
    torch.testing.assert_close(result.loss, (pred - target).square().mean())
    assert result.margin is None


@pytest.mark.parametrize("batch", [
    (torch.zeros(4, 4, 8, 8), None, torch.zeros(4, 4, 8, 8)),
    (torch.zeros(3, 4, 8, 8), torch.zeros(3, 4, 8, 8), torch.zeros(3, 4, 8, 8)),
    (torch.zeros(4, 4, 8, 8), torch.zeros(4, 4, 8, 8), torch.zeros(2, 4, 8, 8)),
    (torch.zeros(4, 4, 8, 8), torch.zeros(2, 4, 8, 8), torch.zeros(4, 4, 8, 8))])
def test_shapes_that_are_no_pairs_are_refused(batch):
    with pytest.raises(ValueError):
        preference_loss(*batch, LossConfig())


def test_a_given_loser_scale_overrides_the_safeguard():
    pred, ref, target = random_batch()
    leaf = pred.requires_grad_()
    config = LossConfig(beta=1.0, use_winner_preserving=True, winner_preserving_mu=0.5)
    preference_loss(leaf, ref, target, config, loser_scale=0.0).loss.backward()
    assert leaf.grad[2:].abs().max() == 0 and leaf.grad[:2].abs().max() > 0


def test_the_second_formulation_has_no_gradient_where_policy_and_reference_are_equal():
    """Why it is not offered: distances to the reference instead of to the target are stationary at the start."""
    pred, _, _ = random_batch()
    leaf = pred.clone().requires_grad_()
    winner, loser = (leaf - pred).square().flatten(1).mean(1).chunk(2)
    torch.nn.functional.softplus(0.5 * 5000 * (winner - loser)).mean().backward()
    assert leaf.grad.abs().max() == 0
