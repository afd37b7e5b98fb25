import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shapes.claims import CONFIGURATIONS
from shapes.claims_report import Interval, interval, verdict, win_rate

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
