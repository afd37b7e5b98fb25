import json
import math

import numpy as np
import pytest
import torch

from training.guards import EventLog, RunningMean, Watch, allowed_bad_pairs

# Replaces the loss of every pair at a position from FIRST to LAST by a value that is not finite, as a bad batch would.
BREAK_LOSS = """
import train
from training.guards import Guards
original, receive = train.preference_loss, Guards.receive
now = []
def note_positions(self, batch):
    now[:] = batch["position"].tolist()
    return receive(self, batch)
def broken(prediction, reference, target, config, *rest):
    result = original(prediction, reference, target, config, *rest)
    hit = [number for number, position in enumerate(now) if FIRST <= position <= LAST]
    if hit:
        result.loss = result.loss * VALUE
        result.logs["train_loss"] = result.loss.detach()
        result.margin = result.margin.clone()
        result.margin[hit] = VALUE
    return result
Guards.receive, train.preference_loss = note_positions, broken
"""


def broken(first: int, last: int, value: str = "nan") -> str:
    return BREAK_LOSS.replace("FIRST", str(first)).replace("LAST", str(last)).replace("VALUE", f"float('{value}')")


def load(path):
    return torch.load(path, weights_only=True)


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
    watch = Watch(winner_rise=0.1, margin=10.0)
    calm = [watch(step, logs(0.005, 1.0)) for step in range(60)]
    assert not any(calm)
    rising = [warning for step in range(200) for warning in watch(step, logs(0.02, 1.0))]
    assert len(rising) == 1 and "above the reference's" in rising[0] and "--use_winner_preserving" in rising[0]
    worse = [warning for step in range(200) for warning in watch(step, logs(0.035, 30.0))]
    assert len([w for w in worse if "above the reference's" in w]) == 1
    assert any("sigmoid is flat" in w and "--beta_dpo" in w for w in worse)


def test_watch_ignores_single_outliers_and_steps_that_are_not_finite():
    watch = Watch(winner_rise=0.1, margin=10.0)
    for step in range(100):
        values = logs(0.05, 3.0) if step % 50 == 49 else logs(0.0, 1.0)
        values = {name: math.nan for name in values} if step == 30 else values
        assert watch(step, values) == []


def test_event_log_forgets_what_comes_again(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.rewind("position", 5)  # nothing there yet
    log.write([{"position": 1}, {"position": 7}])
    with open(log.path, "a") as file:
        file.write('{"position": 3, "row"')  # killed here
    log.rewind("position", 5)
    log.write([{"position": 6}])
    assert [json.loads(line)["position"] for line in log.path.read_text().splitlines()] == [1, 6]


@pytest.mark.parametrize("processes,value", [(1, "nan"), (2, "inf")])
def test_a_step_that_is_not_finite_is_skipped_and_located(train_tiny, tmp_path, processes, value):
    """Pairs 13 and 14: with 4 pairs a step they are in the fourth and no other."""
    batch = f"--train_batch_size={4 // processes}"
    flags = (batch, "--max_train_steps=6", "--checkpointing_steps=1")
    output = train_tiny(tmp_path / "run", *flags, processes=processes, prelude=broken(13, 14, value))
    assert output.count("step 4 is skipped") == 1 and "step 5 is skipped" not in output

    before, after, later = (tmp_path / "run" / f"checkpoint-{step}" for step in (3, 4, 5))
    assert all(torch.equal(a, b) for a, b in zip(load(before / "unet.pth").values(), load(after / "unet.pth").values()))
    first, second = load(before / "optimizer.bin")["state"], load(after / "optimizer.bin")["state"]
    for index in first:
        assert all(torch.equal(first[index][name], second[index][name]) for name in first[index])
    assert not all(torch.equal(a, b) for a, b in zip(load(before / "unet.pth").values(), load(later / "unet.pth").values()))
    assert train_tiny.losses[6]["skipped_steps"] == 1 and not math.isfinite(train_tiny.losses[4]["train_loss"])

    events = [json.loads(line) for line in (tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines()]
    assert {event["step"] for event in events} == {4} and len(events) == processes
    pairs = [pair for event in events for pair in event["pairs"]]
    assert sorted(pair["position"] for pair in pairs) == [13, 14]
    assert all(0 <= pair["timestep"] < 1000 and pair["row"] >= 0 for pair in pairs)


def test_many_in_a_row_stop_with_a_checkpoint_from_before(train_tiny, tmp_path):
    flags = ("--max_train_steps=8", "--max_nonfinite_steps=3", "--checkpointing_steps=0")
    output = train_tiny(tmp_path / "run", *flags, expect=1, prelude=broken(4, 10**9))
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "3 steps in a row" in errors[0] and "checkpoint-2 holds the model from before" in errors[0]
    assert "Traceback" not in output
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    # Mended, it continues from there, and ends as a run that never broke.
    train_tiny(tmp_path / "run", "--max_train_steps=8", "--checkpointing_steps=0")
    train_tiny(tmp_path / "whole", "--max_train_steps=8", "--checkpointing_steps=0")
    mended, whole = (load(tmp_path / name / "unet.pth") for name in ("run", "whole"))
    assert all(torch.equal(mended[key], whole[key]) for key in whole)


def test_a_run_that_is_never_finite_leaves_the_model_it_began_with(train_tiny, tmp_path):
    output = train_tiny(tmp_path / "run", "--max_train_steps=4", "--max_nonfinite_steps=1", "--checkpointing_steps=0", expect=1,
                        prelude=broken(1, 10**9))
    assert "checkpoint-0 holds the model from before" in output
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-0"]
    assert "after step 0" in train_tiny(tmp_path / "run", "--max_train_steps=4", "--checkpointing_steps=0")


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
    from types import SimpleNamespace

    from training.guards import is_finite

    accelerator = SimpleNamespace(scaler=None if scale is None else Scaler(scale))
    assert is_finite(accelerator, {"train_loss": loss, "grad_norm": grad_norm}) is finite


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16's gradient scaler needs a GPU")
def test_fp16_overflows_only_halve_the_scale():
    from accelerate import Accelerator

    from training.run import take_step

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
