import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from losses import LossConfig, preference_loss
from shapes.claims import CONFIGURATIONS, parameter_space_gradients
from shapes.claims_report import Interval, interval, verdict, win_rate
from training.diffusion import NoisyBatch

ROOT = Path(__file__).parents[2]


def test_intervals_are_students():
    assert interval([1.0, 2.0, 3.0]).low == pytest.approx(2 - 4.302653 / np.sqrt(3), abs=1e-5)
    assert np.isnan(interval([1.0]).low)


@pytest.mark.parametrize("value, expected", [
    (Interval(1, 0.5, 1.5), "confirmed"), (Interval(-1, -1.5, -0.5), "refuted"), (Interval(0, -1, 1), "undecided"),
    (Interval(1, np.nan, np.nan), "undecided"),
])
def test_verdicts(value, expected):
    assert verdict(value, 0) == expected


def test_a_difference_that_does_not_matter_refutes():
    assert verdict(Interval(0.001, -0.004, 0.006), 0, refuted_below=0.01) == "refuted"
    assert verdict(Interval(0.005, -0.004, 0.014), 0, refuted_below=0.01) == "undecided"


def test_win_rate_counts_ties_half():
    assert win_rate([1, 0, 0.5, 0.5], [0, 1, 0.5, 0.5]) == 0.5
    assert win_rate([1, 1], [0, 1]) == 0.75


class Linear(torch.nn.Module):
    """Predicts a shared linear map of its input: winner and loser gradients mix in the parameters."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, latents, timesteps, return_dict, **conditioning):
        return ((latents.flatten(1) @ self.weight).view_as(latents),)


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9])
def test_the_parameter_space_lambda_never_raises_what_the_winners_lower(mu):
    """The first-order bound that fails for the output-space lambda under a shared random Jacobian holds here."""
    config = LossConfig(beta=10.0, winner_preserving_mu=mu)
    for seed in range(20):
        torch.manual_seed(seed)
        policy, latents, target = Linear(), torch.randn(4, 1, 4, 4), torch.randn(4, 1, 4, 4)
        latents[2:] = latents[:2] + 0.3 * torch.randn(2, 1, 4, 4)
        inputs = NoisyBatch(latents, torch.zeros(4).long(), target, {})
        reference = policy(latents, None, False)[0].detach()
        scale = parameter_space_gradients(policy, inputs, reference, config)
        winners = torch.autograd.grad(
            preference_loss(policy(latents, None, False)[0], reference, target, config, 0.0).loss, policy.weight)[0]
        descent = (winners * policy.weight.grad).sum()
        assert 0 <= scale <= 1
        assert descent >= mu * winners.square().sum() * (1 - 1e-4) - 1e-7


@pytest.mark.slow
def test_the_experiment_from_end_to_end(tmp_path):
    sizes = {"seeds": 1, "steps": 2, "batch_size": 2, "learning_rates": 2e-5, "train_pairs": 8, "held_out_pairs": 4,
             "selection_prompts": 2, "test_prompts": 4, "inference_steps": 2, "instrument_steps": 1, "timing_rounds": 2,
             "workers": 1}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    done = subprocess.run([sys.executable, "-m", "shapes.claims", "--output", str(tmp_path), *options], cwd=ROOT,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    text = (tmp_path / "claims.md").read_text()
    for method, variant in CONFIGURATIONS:
        assert f"| {method} | {variant} |" in text
    for name in ("claims.html", "images/claims_errors.png", "images/claims_quality.png", "images/claims_grid.png"):
        assert (tmp_path / name).stat().st_size > 1000
