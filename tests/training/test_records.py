"""What a run writes down, and takes up again where it resumes."""

import json

import pytest
import torch
from accelerate import Accelerator

from training.records import EventLog, StepScalars, read_metrics


def test_event_log_forgets_what_comes_again(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.rewind("position", 5)  # nothing there yet
    log.write([{"position": 1}, {"position": 7}])
    with open(log.path, "a") as file:
        file.write('{"position": 3, "row"')  # killed here
    log.rewind("position", 5)
    log.write([{"position": 6}])
    assert [json.loads(line)["position"] for line in log.path.read_text().splitlines()] == [1, 6]


def test_metrics_are_taken_up_after_the_first_step(tmp_path):
    metrics = EventLog(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        metrics.write([{"step": step, "loss": step / 2}])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # killed here
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    metrics.rewind("step", 3)
    metrics.write([{"step": 3, "loss": 9.0}])
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 9.0}]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_scalars_are_means_over_micro_batches_by_their_weights_and_margins_get_their_deviation(fresh_accelerate):
    scalars = StepScalars()
    for margin, weight in ((1.0, 0.5), (5.0, 1.5)):
        scalars.add({"margin_mean": torch.tensor(margin), "margin_square": torch.tensor(margin**2)}, weight)
    means = scalars.reduce(Accelerator(cpu=True), extra=3.0)
    assert means["margin_mean"] == 4.0 and means["extra"] == 3.0
    assert means["margin_std"] == pytest.approx(((0.25 * 1 + 0.75 * 25) - 16) ** 0.5) and "margin_square" not in means
    assert scalars.sums == {} and scalars.count == 0
