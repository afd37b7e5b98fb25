"""The loop itself, with a task that learns a line: steps, guards, checkpoints, stopping, resuming."""

import json
import math
import signal

import pytest
import torch

from common.errors import UserError
from tests.runs import equal
from tests.tasks import fit_fake
from training.records import read_metrics

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def state(checkpoint) -> dict:
    return torch.load(checkpoint / "unet.pth", weights_only=True)


def checkpoints(output) -> list[str]:
    return sorted(path.name for path in output.glob("checkpoint-*"))


def test_a_run_takes_its_steps_and_tells_of_each(tmp_path):
    seen = []
    outcome, task = fit_fake(tmp_path, "--gradient_accumulation_steps=2", watch=lambda *told: seen.append(told))
    assert (outcome.step, outcome.finished) == (4, True)
    assert [step for step, _, _ in seen] == [0, 1, 2, 3, 4] and seen[0][2] == {} and seen[1][1] is task.trained
    assert task.settled == [1, 2, 3, 4] and task.seen == 8 and task.validated == [4]
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert {"train_loss", "grad_norm", "lr", "pairs_per_second", "peak_memory_gb", "skipped_steps", "seen"} <= metrics[0].keys()
    assert metrics[0]["train_loss"] == seen[1][2]["train_loss"] > metrics[3]["train_loss"]
    assert checkpoints(tmp_path) == ["checkpoint-4"]


def test_on_a_cpu_denormal_numbers_are_0_for_as_long_as_it_runs(tmp_path):
    def smallest(*_) -> float:
        told.append(float(torch.tensor([1e-30]) * 1e-10))

    told = []
    smallest(), fit_fake(tmp_path, "--max_train_steps=1", watch=smallest), smallest()
    assert told[0] == told[-1] > 0 == max(told[1:-1])


def test_the_rate_that_is_logged_is_the_step_s_own(tmp_path):
    fit_fake(tmp_path, "--lr_warmup_steps=2", "--learning_rate=1e-2")
    assert [line["lr"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0.0, 5e-3, 1e-2, 1e-2]


def test_a_long_step_is_announced(tmp_path, capsys, monkeypatch):
    fit_fake(tmp_path / "short", "--gradient_accumulation_steps=2")
    assert "micro-steps" not in capsys.readouterr().out
    monkeypatch.setattr("training.fit.LONG_STEP", 0.0)
    fit_fake(tmp_path / "long", "--gradient_accumulation_steps=2")
    assert capsys.readouterr().out.count("a step of 2 micro-steps takes about 0 s here") == 1


def test_micro_batches_are_averaged(tmp_path):
    """Two micro-batches of 8 and their weights make the gradient of their mean."""
    first, weights = [], []
    fit_fake(tmp_path / "two", "--gradient_accumulation_steps=2", "--max_train_steps=1", "--optimizer=sgd",
             watch=lambda step, network, logs: (first.append(logs.get("grad_norm")), weights.append(network.weight.detach().clone())))
    rows = torch.cat([torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)])
    torch.manual_seed(0)
    line = torch.nn.Linear(4, 1)
    (line(rows)[:, 0] - rows.sum(1)).square().mean().backward()
    norm = math.sqrt(sum(p.grad.square().sum() for p in line.parameters()))
    assert first[1] == pytest.approx(norm, rel=1e-5)
    torch.testing.assert_close(weights[1], line.weight.detach() - 0.1 * line.weight.grad / max(norm, 1.0))  # clipped at 1


@pytest.mark.parametrize("steps, expected", [(1, ["1", "2", "3", "4"]), (3, ["3", "4"]), (0, ["4"])])
def test_checkpoints_come_at_their_steps_and_at_the_end(tmp_path, steps, expected):
    fit_fake(tmp_path, f"--checkpointing_steps={steps}")
    assert checkpoints(tmp_path) == [f"checkpoint-{step}" for step in expected]


def test_only_as_many_checkpoints_as_asked_for_are_kept(tmp_path):
    fit_fake(tmp_path, "--checkpointing_steps=1", "--checkpoints_total_limit=2")
    assert checkpoints(tmp_path) == ["checkpoint-3", "checkpoint-4"]


def test_a_task_that_is_busy_is_saved_once_it_is_not(tmp_path):
    """SPO's rounds: a checkpoint that is due within one is written at its end."""
    fit_fake(tmp_path, "--checkpointing_steps=2", "--max_train_steps=6", busy={2, 4})
    assert checkpoints(tmp_path) == ["checkpoint-3", "checkpoint-5", "checkpoint-6"]


def test_a_step_without_micro_batches_learns_nothing_and_is_no_step(tmp_path):
    fit_fake(tmp_path / "plain")
    _, task = fit_fake(tmp_path / "gaps", empty={1, 3})
    assert task.settled == [1, 2, 3, 4]
    assert equal(state(tmp_path / "plain" / "checkpoint-4"), state(tmp_path / "gaps" / "checkpoint-4"))


def test_validation_comes_at_its_steps_and_at_the_end(tmp_path):
    _, task = fit_fake(tmp_path / "two", "--validation_steps=2", "--max_train_steps=5")
    assert task.validated == [2, 4, 5]
    _, task = fit_fake(tmp_path / "two", "--validation_steps=2", "--max_train_steps=6")
    assert task.validated == [6]  # resumed: what was drawn before is not drawn again


def test_a_resumed_run_ends_as_the_unbroken_one(tmp_path):
    flags = ("--checkpointing_steps=2", "--max_train_steps=6", "--lr_scheduler=cosine", "--gradient_accumulation_steps=2")
    fit_fake(tmp_path / "whole", *flags)
    for lost in ("checkpoint-6", "checkpoint-4"):
        (tmp_path / "whole" / lost).rename(tmp_path / lost)
    whole = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    outcome, task = fit_fake(tmp_path / "whole", *flags)
    assert (outcome.step, task.settled, task.seen) == (6, [3, 4, 5, 6], 12)
    for name in ("checkpoint-4", "checkpoint-6"):
        assert equal(state(tmp_path / name), state(tmp_path / "whole" / name))
    again = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert [line["step"] for line in again] == [1, 2, 3, 4, 5, 6], "lines beyond the checkpoint come once"
    assert [(line["train_loss"], line["lr"]) for line in again] == [(line["train_loss"], line["lr"]) for line in whole]


def test_a_finished_run_is_finished(tmp_path):
    fit_fake(tmp_path)
    outcome, task = fit_fake(tmp_path)
    assert (outcome.step, outcome.finished, task.settled, task.validated) == (4, True, [], [])
    fit_fake(tmp_path, "--max_train_steps=5")
    assert checkpoints(tmp_path) == ["checkpoint-4", "checkpoint-5"]
    with pytest.raises(UserError, match="checkpoint-5 is beyond --max_train_steps 4"):
        fit_fake(tmp_path)


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_with_a_checkpoint(tmp_path, kind, capsys):
    outcome, task = fit_fake(tmp_path / "stopped", "--checkpointing_steps=0",
                             watch=lambda step, *_: step == 2 and signal.raise_signal(kind))
    assert (outcome.step, outcome.finished) == (3, False) and checkpoints(tmp_path / "stopped") == ["checkpoint-3"]
    assert f"Stopped by {kind.name}: {tmp_path / 'stopped' / 'checkpoint-3'} is saved, the same command continues" in (
        capsys.readouterr().out)
    assert task.validated == []
    fit_fake(tmp_path / "stopped"), fit_fake(tmp_path / "whole")
    assert equal(state(tmp_path / "stopped" / "checkpoint-4"), state(tmp_path / "whole" / "checkpoint-4"))


def test_a_signal_waits_for_a_task_that_is_busy_and_is_heard_in_a_step_without_micro_batches(tmp_path):
    outcome, _ = fit_fake(tmp_path / "busy", busy={2, 3}, watch=lambda step, *_: step == 1 and signal.raise_signal(signal.SIGTERM))
    assert (outcome.step, outcome.finished) == (4, True)
    outcome, _ = fit_fake(tmp_path / "empty", empty={3}, watch=lambda step, *_: step == 2 and signal.raise_signal(signal.SIGTERM))
    assert (outcome.step, outcome.finished) == (2, False) and checkpoints(tmp_path / "empty") == ["checkpoint-2"]


def test_a_signal_in_the_last_step_finishes_the_run(tmp_path):
    outcome, _ = fit_fake(tmp_path, watch=lambda step, *_: step == 3 and signal.raise_signal(signal.SIGTERM))
    assert (outcome.step, outcome.finished) == (4, True)


def test_a_step_that_is_not_finite_leaves_model_and_optimizer_alone(tmp_path, capsys):
    seen = []
    _, task = fit_fake(tmp_path, "--checkpointing_steps=1", nan_from=2, nan_to=2, watch=lambda *told: seen.append(told[2]))
    before, after, later = (tmp_path / f"checkpoint-{step}" for step in (1, 2, 3))
    assert equal(state(before), state(after)) and not equal(state(before), state(later))
    first, second = (torch.load(folder / "optimizer.bin", weights_only=True)["state"] for folder in (before, after))
    assert all(torch.equal(first[i][name], second[i][name]) for i in first for name in first[i])
    assert [step.get("skipped_steps") for step in seen] == [None, 0, 1, 1, 1] and math.isnan(seen[2]["train_loss"])
    assert "step 2 is skipped: loss nan" in capsys.readouterr().err and task.named == [2]
    [event] = map(json.loads, (tmp_path / "nonfinite.jsonl").read_text().splitlines())
    assert event["step"] == 2 and event["pairs"] == [{"seen": 2}]


def test_many_in_a_row_stop_with_a_checkpoint_from_before(tmp_path):
    flags = ("--max_train_steps=8", "--max_nonfinite_steps=3", "--checkpointing_steps=0")
    with pytest.raises(UserError, match="3 steps in a row: .*checkpoint-2 is saved"):
        fit_fake(tmp_path / "run", *flags, nan_from=3)
    assert checkpoints(tmp_path / "run") == ["checkpoint-2"]
    # Mended, it continues from there, and ends as a run that never broke.
    _, task = fit_fake(tmp_path / "run", *flags)
    fit_fake(tmp_path / "whole", *flags)
    assert task.settled[0] == 3 and not (tmp_path / "run" / "nonfinite.jsonl").read_text()
    assert equal(state(tmp_path / "run" / "checkpoint-8"), state(tmp_path / "whole" / "checkpoint-8"))


def test_a_run_that_is_never_finite_leaves_the_model_it_began_with(tmp_path):
    with pytest.raises(UserError, match="checkpoint-0 is saved"):
        fit_fake(tmp_path, "--max_nonfinite_steps=1", nan_from=1)
    assert checkpoints(tmp_path) == ["checkpoint-0"]
    _, task = fit_fake(tmp_path)
    assert task.settled == [1, 2, 3, 4]


def test_what_the_task_finds_wrong_ends_the_run_once_it_is_saved(tmp_path):
    with pytest.raises(UserError, match="the well is dry .*checkpoint-2 is saved"):
        fit_fake(tmp_path, problem_at=2)
    assert checkpoints(tmp_path) == ["checkpoint-2"]


def test_a_warning_of_a_rate_that_moves_nothing(tmp_path, capsys):
    fit_fake(tmp_path / "slow", "--learning_rate=1e-30")
    assert "learning rate" in capsys.readouterr().err
    fit_fake(tmp_path / "usual")
    assert capsys.readouterr().err.count("learning rate") == 0


def test_two_processes_take_the_steps_of_one(tmp_path, program):
    """Each has half of the batch; gradients and scalars are averaged."""
    for processes, name in ((1, "one"), (2, "two")):
        program("tests.tasks", ["--output_dir", tmp_path / name, "--optimizer=sgd"], processes)
    one, two = (state(tmp_path / name / "checkpoint-4") for name in ("one", "two"))
    assert all(torch.allclose(one[key], two[key], atol=1e-6) for key in one)
    logged = [read_metrics(tmp_path / name / "metrics.jsonl")[-1] for name in ("one", "two")]
    assert logged[0]["train_loss"] == pytest.approx(logged[1]["train_loss"], rel=1e-4)
    assert [line["rank"] for line in logged] == [0.0, 0.5]
