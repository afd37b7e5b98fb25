"""losses/spo.py against the official implementation's numbers and against diffusers' DDIM."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file

from losses.spo import choose_pairs, clipped_ratio, ddim_gaussian, gaussian_log_prob, spo_loss


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
    best, worst, kept = choose_pairs(step["pool_scores"], threshold=0.3)
    assert torch.equal(torch.stack([best, worst]), step["pool_best_worst"])
    assert torch.equal(kept, step["pool_valid"])


def test_equal_scores_are_no_pair():
    assert not choose_pairs(torch.zeros(4, 3), threshold=0.0)[2].any()


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
