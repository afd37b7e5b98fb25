"""Step-aware preference optimisation (SPO, arXiv:2406.04314): log-probabilities, clipped ratios, loss, pool choice.

Pure functions of tensors. A denoising step is a Gaussian N(m, s^2): DDIM's (arXiv:2010.02502, equations 12 and 16), or for
flow matching a step of the SDE that has the flow's marginals (Flow-GRPO, arXiv:2505.05470).
"""

import math

import torch
import torch.nn.functional as F


def clean_and_noise(prediction: torch.Tensor, x_t: torch.Tensor, timestep: torch.Tensor, alphas_cumprod: torch.Tensor,
                    prediction_type: str = "epsilon") -> tuple[torch.Tensor, torch.Tensor]:
    """The clean latents x0-hat and the noise that a prediction amounts to, both (N, ...) in float32.

    prediction, x_t: (N, ...), the model's (guided) prediction and its input; timestep: (N,); alphas_cumprod: (T,).
    Raises ValueError for a prediction type other than "epsilon" and "v_prediction".
    """
    prediction, x_t = prediction.float(), x_t.float()
    a = _per_sample(alphas_cumprod, timestep, x_t)
    if prediction_type == "epsilon":
        return (x_t - (1 - a).sqrt() * prediction) / a.sqrt(), prediction
    if prediction_type == "v_prediction":
        return a.sqrt() * x_t - (1 - a).sqrt() * prediction, a.sqrt() * prediction + (1 - a).sqrt() * x_t
    raise ValueError(f"prediction_type must be epsilon or v_prediction, not {prediction_type}")


def ddim_gaussian(
    prediction: torch.Tensor, x_t: torch.Tensor, timestep: torch.Tensor, previous_timestep: torch.Tensor,
    alphas_cumprod: torch.Tensor, eta: float = 1.0, prediction_type: str = "epsilon",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean m, standard deviation s of x_{t-1} given x_t, and the predicted clean latents x0-hat.

    Arguments as in clean_and_noise; previous_timestep (N,) is clamped to >= 0. Returns m (N, ...), s (N, 1, ...),
    x0-hat (N, ...), float32.
    """
    x0, noise = clean_and_noise(prediction, x_t, timestep, alphas_cumprod, prediction_type)
    a = _per_sample(alphas_cumprod, timestep, x_t)
    a_previous = _per_sample(alphas_cumprod, previous_timestep.clamp(min=0), x_t)
    variance = (1 - a_previous) / (1 - a) * (1 - a / a_previous)
    std = eta * variance.sqrt()
    mean = a_previous.sqrt() * x0 + (1 - a_previous - std**2).sqrt() * noise
    return mean, std, x0


def flow_gaussian(velocity: torch.Tensor, x_t: torch.Tensor, sigma: torch.Tensor, next_sigma: torch.Tensor,
                  noise_level: float = 0.7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean m, standard deviation s of x at next_sigma given x_t at sigma, and the predicted clean latents x0-hat.

    velocity, x_t: (N, ...), noise - x0 as predicted, and its input; sigma > next_sigma: (N,) in [0, 1]. One Euler-Maruyama
    step of dx = (v + g^2 / (2 sigma) noise-hat) d sigma + g dw, g = noise_level sqrt(sigma / (1 - sigma)); from pure noise,
    where g is infinite, with the g that next_sigma's denominator gives, as the Flow-GRPO program has it. Returns m (N, ...),
    s (N, 1, ...), x0-hat (N, ...), float32.
    """
    velocity, x_t = velocity.float(), x_t.float()
    sigma, next_sigma = (values.float().view(-1, *(1,) * (x_t.dim() - 1)) for values in (sigma, next_sigma))
    step = sigma - next_sigma
    g = noise_level * (sigma / (1 - torch.where(sigma < 1, sigma, next_sigma))).sqrt()
    noise = x_t + (1 - sigma) * velocity
    return x_t - step * (velocity + g**2 / (2 * sigma) * noise), g * step.sqrt(), x_t - sigma * velocity


def _per_sample(alphas_cumprod: torch.Tensor, timestep: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
    return alphas_cumprod.to(x_t.device, torch.float32)[timestep].view(-1, *(1,) * (x_t.dim() - 1))


def gaussian_log_prob(sample: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Log-density of `sample` (N, ...) under N(mean, std^2), AVERAGED over the non-batch dimensions, as SPO does. (N,)"""
    log_density = -((sample.float() - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return log_density.flatten(1).mean(dim=1)


def clipped_ratio(logp_policy: torch.Tensor, logp_reference: torch.Tensor, clip: float = 0.1) -> torch.Tensor:
    """Ratio policy/reference of the two densities, clamped to [1 - clip, 1 + clip] (no gradient outside). (N,)"""
    return (logp_policy - logp_reference).exp().clamp(1 - clip, 1 + clip)


def spo_loss(ratio_w: torch.Tensor, ratio_l: torch.Tensor, beta: float = 10.0) -> torch.Tensor:
    """-log sigmoid(beta * (log ratio_w - log ratio_l)), the mean over the N pairs. ratio_w, ratio_l: (N,)"""
    return -F.logsigmoid(beta * (ratio_w.log() - ratio_l.log())).mean()


def best_and_worst(scores: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best and the worst member of each pool, and whether the two differ enough to learn from.

    scores: (k, N), the pool's k members scored for each of N prompts. Returns best (N,), worst (N,) as rows of the pool
    and kept (N,): sigmoid(best - worst) - sigmoid(worst - best) > threshold, the two-way softmax's difference.
    """
    best, worst = scores.argmax(dim=0), scores.argmin(dim=0)
    difference = scores.amax(dim=0) - scores.amin(dim=0)
    return best, worst, torch.tanh(difference.float() / 2) > threshold
