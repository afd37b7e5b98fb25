"""The rules by which a run goes on, skips a step, warns or stops."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.errors import UserError
from data.bad_pairs import allowed_bad_pairs
from training.guards import RunningMean, DriftWatch, count_in, is_finite
from training.optimizers import take_step


def test_allowed_bad_pairs_forgives_an_unlucky_beginning():
    assert allowed_bad_pairs(1, 0.01) == 1  # the first pair may be bad
    assert allowed_bad_pairs(10_000, 0.01) == 100 + 3 * 10
    assert allowed_bad_pairs(10_000, 0.0) == 0 and allowed_bad_pairs(10_000, 1.0) == 10_000
    rng, stopped = np.random.default_rng(0), 0
    for _ in range(200):  # runs whose data is half as bad as allowed
        bad = np.cumsum(rng.random(20_000) < 0.005)
        stopped += any(bad[seen - 1] > allowed_bad_pairs(seen, 0.01) for seen in range(1, 20_001, 16))
    assert stopped <= 10
    bad = np.cumsum(rng.random(20_000) < 0.02)  # and twice as bad
    assert bad[-1] > allowed_bad_pairs(20_000, 0.01)


def test_running_mean_is_unbiased_from_the_first_value():
    mean = RunningMean(50)
    assert mean.add(3.0) == pytest.approx(3.0) and mean.add(3.0) == pytest.approx(3.0)
    for _ in range(1000):
        last = mean.add(7.0)
    assert last == pytest.approx(7.0)


def logs(rise: float, margin: float) -> dict[str, float]:
    return {"train_loss": 0.5, "avg_win_diff_loss": rise, "ref_mse_unaccumulated": 0.1, "margin_mean": margin,
            "margin_std": 0.0}


def test_watch_warns_once_of_each_pathology_and_again_when_it_has_doubled():
    watch = DriftWatch(winner_rise=0.1, margin=10.0)
    calm = [watch(step, logs(0.005, 1.0)) for step in range(60)]
    assert not any(calm)
    rising = [warning for step in range(200) for warning in watch(step, logs(0.02, 1.0))]
    assert len(rising) == 1 and "above the reference's" in rising[0] and "--use_winner_preserving" in rising[0]
    worse = [warning for step in range(200) for warning in watch(step, logs(0.035, 30.0))]
    assert len([w for w in worse if "above the reference's" in w]) == 1
    assert any("sigmoid is flat" in w and "--beta_dpo" in w for w in worse)


def test_watch_warns_once_of_a_safeguard_that_leaves_fine_tuning_on_winners():
    def run(loss: float, loser: float) -> list[str]:
        watch = DriftWatch(winner_rise=0.1, margin=1e9, safeguarded=True)
        step = {"avg_lose_l_scale": 0.2, "avg_lose_diff_loss": loser, "train_loss": loss}
        return [warning for number in range(100) for warning in watch(number, logs(-0.09, 30.0) | step)]

    [told] = run(27.7, -0.088)
    assert "fine-tuning on the winners" in told and "--train_method sft" in told
    assert not run(0.6, -0.088) and not run(27.7, 0.01)


def test_watch_ignores_single_outliers_and_steps_that_are_not_finite():
    watch = DriftWatch(winner_rise=0.1, margin=10.0)
    for step in range(100):
        values = logs(0.05, 3.0) if step % 50 == 49 else logs(0.0, 1.0)
        values = {name: math.nan for name in values} if step == 30 else values
        assert watch(step, values) == []


def test_watch_warns_of_a_safeguard_that_never_acts():
    def warnings(scale: float, safeguarded: bool = True) -> list[str]:
        watch = DriftWatch(winner_rise=0.1, margin=10.0, safeguarded=safeguarded)
        return [warning for step in range(200)
                for warning in watch(step, logs(0.0, 1.0) | {"avg_lose_l_scale": scale if step == 10 else 1.0})]

    [warning] = warnings(1.0)
    assert "the safeguard has changed nothing" in warning and "--winner_preserving_mu" in warning
    assert warnings(0.9) == warnings(1.0, safeguarded=False) == []


def test_a_damaged_count_of_a_checkpoint_is_told():
    assert count_in({}, "pairs_seen", 5) == 5 and count_in({"pairs_seen": 7}, "pairs_seen") == 7
    for value in (-1, "7", 2.5, None):
        with pytest.raises(UserError, match="counts of the checkpoint's progress.json are damaged"):
            count_in({"pairs_seen": value}, "pairs_seen")


class Scaler:
    """GradScaler's part in the guard: its scale."""

    def __init__(self, scale: float):
        self.scale = scale

    def get_scale(self) -> float:
        return self.scale


@pytest.mark.parametrize("scale,loss,grad_norm,finite", [
    (65536.0, 0.7, math.inf, True),  # the scaler's ordinary overflow: it skips the step itself and halves
    (1.0, 0.7, math.inf, False),  # nothing is left to halve
    (65536.0, math.nan, math.nan, False),  # the forward pass itself
    (None, 0.7, math.inf, False),  # no scaler
    (None, 0.7, 1.0, True),
])
def test_overflow_of_fp16_gradients_is_left_to_the_scaler(scale, loss, grad_norm, finite):
    accelerator = SimpleNamespace(scaler=None if scale is None else Scaler(scale))
    assert is_finite(accelerator, {"train_loss": loss, "grad_norm": grad_norm}) is finite


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16's gradient scaler needs a GPU")
def test_fp16_overflows_only_halve_the_scale():
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="fp16")
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    weight = accelerator.unwrap_model(model).weight
    for factor, finite, moves in ((1e30, True, False), (float("nan"), False, False), (1.0, True, True)):
        before, scale = weight.detach().clone(), accelerator.scaler.get_scale()
        accelerator.backward(model(torch.ones(2, 4, device=accelerator.device)).float().mean() * factor)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        take_step(accelerator, optimizer, schedule, finite)
        assert torch.equal(weight, before) is not moves
        assert accelerator.scaler.get_scale() == (scale if moves else scale / 2)
