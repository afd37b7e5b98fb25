import json
from dataclasses import replace

import numpy as np
import pytest

from shapes import claims_report, claims_runs
from shapes.claims_options import Settings
from shapes.claims_report import Interval, interval, verdict, win_rate
from shapes.experiment import run_options


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


SMALL = Settings(seeds=1, steps=2, batch_size=2, learning_rates=[2e-5], train_pairs=8, held_out_pairs=4, selection_prompts=2,
                 test_prompts=4, inference_steps=2, instrument_steps=1, timing_rounds=2, workers=1)


@pytest.mark.slow
def test_the_experiment_from_end_to_end_and_a_second_call_trains_nothing(tmp_path, monkeypatch):
    for module in (claims_runs, claims_report):
        monkeypatch.setattr(module, "METHODS", {"diffusion-dpo": 0.9})
    configurations = [("diffusion-dpo", variant) for variant in claims_runs.VARIANTS] + [claims_runs.WINNER_ONLY]
    monkeypatch.setattr(claims_runs, "CONFIGURATIONS", configurations)
    monkeypatch.setattr(claims_runs, "LAMBDAS", {kind: claims_runs.LAMBDAS[kind] for kind in ("none", "parameters")})
    claims_runs.experiment(settings := replace(SMALL, output=str(tmp_path)))
    text = (tmp_path / "claims.md").read_text()
    for method, variant in configurations:
        assert f"| {method} | {variant} |" in text
    for name in ("claims.html", "images/claims_errors.png", "images/claims_quality.png", "images/claims_grid.png"):
        assert (tmp_path / name).stat().st_size > 1000

    records = {path.name: json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*_seed0.json")}
    scales = {record["variant"]: record["winner_scale"] for record in records.values()}
    assert scales["lambda 0"] == [0, 0] and scales["plain"] == scales["winner only"] == [1, 1]
    assert scales["fixed lambda"] == pytest.approx([0.1, 0.1])
    for record in records.values():  # the first errors are the reference's own
        assert record["curve"][0]["winner"] == record["curve"][0]["ref_winner"] and len(record["curve"]) == 3

    monkeypatch.setattr(claims_runs, "train_policy", None)
    claims_runs.experiment(settings)
    name = "diffusion-dpo_safeguarded_lr2e-05_seed0.json"  # the same again, bit for bit
    monkeypatch.undo()
    run = claims_runs.Run("diffusion-dpo", "safeguarded", 2e-5, 0)
    assert claims_runs.train_policy(run, "test", settings) == records[name]


def test_each_configuration_is_a_choice_of_options():
    for method, variant in claims_runs.CONFIGURATIONS:
        words = claims_runs.objective(method, variant)
        options = run_options(pretrained_model_name_or_path="base", cached_dataset="cache", **words)
        assert options.objective.use_winner_preserving == (variant == "safeguarded")
        assert (options.objective.fixed_lambda is not None) == (variant in ("lambda 0", "fixed lambda"))
    assert claims_runs.objective("dspo", "fixed lambda")["fixed_lambda"] == pytest.approx(0.8)
