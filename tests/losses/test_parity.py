"""Agreement with numbers computed by the official implementations (tests/parity, float32 on the CPU)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from losses import LossConfig, preference_loss

PARITY = Path(__file__).parents[1] / "parity"
CASES = json.loads((PARITY / "losses.json").read_text())
TENSORS = load_file(PARITY / "losses.safetensors")


def case_config(case: dict) -> LossConfig:
    mu = case["winner_preserving_mu"]
    return LossConfig(method=case["method"], beta=case["beta"], dmpo_alpha=case["dmpo_alpha"], sdxl=case["sdxl"],
                      use_winner_preserving=mu is not None, winner_preserving_mu=mu or 0.0)


def test_every_case_is_there():
    assert len(CASES) == 55


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_loss_scale_margin_and_gradient_agree(case):
    pred, ref, target = (TENSORS[f"{case['inputs']}.{name}"] for name in ("model_pred", "ref_pred", "target"))
    pred = pred.clone().requires_grad_()
    result = preference_loss(pred, ref, target, case_config(case))
    result.loss.backward()

    close = dict(rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(result.loss.item(), case["loss"], **close)
    torch.testing.assert_close(result.winner_scale.item(), case["scale"], **close)
    # A margin is beta times a small difference of errors: float32 rounding of errors near 1 is its absolute tolerance.
    torch.testing.assert_close(result.margin, torch.tensor(case["margin"]), rtol=1e-5, atol=case["beta"] * 2.5e-7)
    torch.testing.assert_close(result.logs["model_mse_unaccumulated"].item(), case["model_mse"], **close)
    torch.testing.assert_close(result.logs["ref_mse_unaccumulated"].item(), case["ref_mse"], **close)
    torch.testing.assert_close(result.logs["avg_win_diff_loss"].item(), case["win_diff"], rtol=1e-5, atol=2.5e-7)
    torch.testing.assert_close(result.logs["avg_lose_diff_loss"].item(), case["lose_diff"], rtol=1e-5, atol=2.5e-7)
    if not case["inputs"].startswith("identical"):  # exact ties: one half here, 0 there
        torch.testing.assert_close(result.logs["implicit_acc_accumulated"].item(), case["implicit_acc"], **close)

    expected = TENSORS[f"{case['id']}.grad"]
    difference = torch.linalg.vector_norm(pred.grad - expected)
    assert difference <= 1e-4 * torch.linalg.vector_norm(expected)
