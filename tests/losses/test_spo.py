"""losses/spo.py against the official implementation's numbers and against diffusers' DDIM."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from losses.spo import best_and_worst, clipped_ratio, ddim_gaussian, flow_gaussian, gaussian_log_prob, spo_loss


@pytest.fixture(scope="module")
def step():
    return load_file(Path(__file__).parent.parent / "parity" / "spo_step.safetensors")


@pytest.fixture(scope="module")
def scheduler():
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                              set_alpha_to_one=False, clip_sample=False, timestep_spacing="leading")
    scheduler.set_timesteps(20)
    return scheduler


def log_probs(step, prediction, scheduler):
    mean, std, _ = ddim_gaussian(prediction, step["x_t"], step["timesteps"], step["timesteps"] - 50,
                                 scheduler.alphas_cumprod)
    return gaussian_log_prob(step["next_w"], mean, std), gaussian_log_prob(step["next_l"], mean, std)


def test_parity_of_log_probs_ratios_loss_and_gradient(step, scheduler):
    prediction = step["policy_pred"].requires_grad_()
    policy_w, policy_l = log_probs(step, prediction, scheduler)
    reference_w, reference_l = log_probs(step, step["ref_pred"], scheduler)
    ratio_w, ratio_l = clipped_ratio(policy_w, reference_w), clipped_ratio(policy_l, reference_l)
    loss = spo_loss(ratio_w, ratio_l)
    for name, ours in {"logp_policy_w": policy_w, "logp_policy_l": policy_l, "logp_ref_w": reference_w,
                       "logp_ref_l": reference_l, "ratio_w": ratio_w, "ratio_l": ratio_l, "loss": loss[None]}.items():
        torch.testing.assert_close(ours.detach(), step[name], rtol=1e-5, atol=1e-6, msg=name)
    (gradient,) = torch.autograd.grad(loss, prediction)
    expected = step["grad_policy_pred"]
    assert (gradient - expected).norm() / expected.norm() < 1e-4
    assert gradient[2].abs().max() == 0  # both of that pair's ratios sit at the clip


def test_parity_of_the_pool_choice(step):
    best, worst, kept = best_and_worst(step["pool_scores"], threshold=0.3)
    assert torch.equal(torch.stack([best, worst]), step["pool_best_worst"])
    assert torch.equal(kept, step["pool_valid"])


def test_equal_scores_are_no_pair():
    assert not best_and_worst(torch.zeros(4, 3), threshold=0.0)[2].any()


def test_loss_is_log_two_where_policy_is_reference():
    logp = torch.randn(5)
    ratio = clipped_ratio(logp, logp)
    assert spo_loss(ratio, ratio).item() == torch.tensor(2.0).log().item()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_step_equals_diffusers_ddim(scheduler, prediction_type, eta):
    scheduler = DDIMScheduler.from_config(scheduler.config, prediction_type=prediction_type)
    scheduler.set_timesteps(20)
    generator = torch.Generator().manual_seed(0)
    x_t, prediction, noise = torch.randn(3, 1, 4, 8, 8, generator=generator)
    for t in scheduler.timesteps:
        expected = scheduler.step(prediction, t, x_t, eta=eta, variance_noise=noise)
        mean, std, x0 = ddim_gaussian(prediction, x_t, t[None], t[None] - 50, scheduler.alphas_cumprod, eta,
                                      prediction_type)
        torch.testing.assert_close(mean + std * noise, expected.prev_sample, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x0, expected.pred_original_sample, rtol=1e-5, atol=1e-5)


def test_unknown_prediction_type_is_refused(scheduler):
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match="prediction_type"):
        ddim_gaussian(x, x, torch.tensor([1]), torch.tensor([0]), scheduler.alphas_cumprod, prediction_type="sample")


# --- flow matching -------------------------------------------------------------------------------------------------------

def test_a_flow_step_by_hand():
    """g^2 = 0.49 * 0.8 / 0.2 = 1.96, noise-hat 1 + 0.2 * 0.5 = 1.1, drift 0.5 + 1.96 / 1.6 * 1.1 = 1.8475; from pure noise
    g^2 = 0.49 / 0.1 = 4.9, with the next step's denominator, and drift 0.5 + 4.9 / 2."""
    mean, std, x0 = flow_gaussian(torch.full((2, 1), 0.5), torch.ones(2, 1), torch.tensor([0.8, 1.0]), torch.tensor([0.6, 0.9]))
    torch.testing.assert_close(mean.flatten(), torch.tensor([1 - 0.2 * 1.8475, 1 - 0.1 * 2.95]))
    torch.testing.assert_close(std.flatten(), torch.tensor([1.4 * 0.2**0.5, 0.7]))
    torch.testing.assert_close(x0.flatten(), torch.tensor([0.6, 0.5]))


def test_without_noise_a_flow_step_is_the_schedulers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    x_t, velocity = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for t, sigma, next_sigma in zip(scheduler.timesteps, scheduler.sigmas, scheduler.sigmas[1:]):
        mean, std, _ = flow_gaussian(velocity, x_t, sigma[None], next_sigma[None], noise_level=0)
        torch.testing.assert_close(mean, scheduler.step(velocity, t, x_t).prev_sample)
        assert std == 0


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
def test_the_random_flow_ends_in_the_datas_distribution(spread):
    """Of Gaussian data the velocity is linear in x_t, and every step's variance follows from the one before."""
    sigmas = torch.linspace(1, 0, 2001, dtype=torch.float64)
    variance, one = 1.0, torch.ones(1, 1)
    for sigma, next_sigma in zip(sigmas[:-1], sigmas[1:]):
        velocity = (sigma - (1 - sigma) * spread**2) / ((1 - sigma) ** 2 * spread**2 + sigma**2)
        mean, std, _ = flow_gaussian(velocity * one, one, sigma[None], next_sigma[None])
        variance = float(mean) ** 2 * variance + float(std) ** 2
    assert variance == pytest.approx(spread**2, rel=0.01)
