"""What is concluded from records: made up here, so that the conclusions are known."""

from pathlib import Path

import numpy as np
import pytest

from common.files import write_json
from shapes.experiments.claims import claims_in, harmful_rate, weigh
from shapes.experiments.plan import SEED, SHORT, WORLD, WORLDS, Config, Run, Settings
from shapes.experiments.report import ranking, write_report
from shapes.experiments.results import Cell, Interval, Results, interval
from shapes.experiments.runs import base_path, is_done, judged_steps, record_path

BASE = 0.80
FLOW = WORLDS["flow"]
PLAIN, SAFE = (Config(WORLD, "diffusion-dpo", variant) for variant in ("plain", "safeguarded"))
ENDS = {PLAIN: {1e-5: 0.84, 3e-5: 0.86, 1e-4: 0.78, 3e-4: 0.70, 1e-3: 0.60},
        SAFE: {1e-5: 0.82, 3e-5: 0.84, 1e-4: 0.86, 3e-4: 0.81, 1e-3: 0.75}}


def record(end: float, seed: int, steps: list[int], rise: float) -> dict:
    """A run whose score goes straight to its end, and ends where it has collapsed."""
    points = []
    for step in steps:
        score = BASE + (end - BASE) * step / steps[-1] + 0.001 * seed
        points.append({"step": step, "seconds": step / 4, "scores": [score, score], "shape": 1.0, "colour": 0.9, "background": 1.0,
                       "position": 1.0, "cleanliness": 0.7, "winner": rise * step / steps[-1] / 100 * 0.05, "loser": 0.01,
                       "reference": 0.05, "margin": 1.0, "accuracy": 0.7, "lambda": 1.0})
        if score < BASE - 0.08:
            break
    return {"share": 1.0, "points": points}


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Settings:
    settings = Settings(output=str(tmp_path_factory.mktemp("claims")))
    base_path(WORLD, settings).parent.mkdir(parents=True)
    write_json(base_path(WORLD, settings), {"scores": [BASE, BASE]})
    for config, ends in ENDS.items():
        for rate, end in ends.items():
            for seed in range(4):
                rise = (50.0 if config is PLAIN else 0.2) * rate / 1e-4 + 0.01 * seed
                run = Run(config, rate, seed)
                path = record_path(run, settings)
                write_json(path, made := record(end, seed, judged_steps(settings), rise))
                if seed == SEED:
                    np.savez(path.with_suffix(".npz"), **{str(p["step"]): np.zeros((2, 32, 32, 3), np.uint8) for p in made["points"]})
    return settings


def test_intervals_are_students():
    assert interval([1.0, 2.0, 3.0]).low == pytest.approx(2 - 4.302653 / np.sqrt(3), abs=1e-5)
    assert np.isnan(interval([1.0]).low) and np.isnan(interval([]).mean)


@pytest.mark.parametrize("value, bounds, expected", [
    (Interval(1, 0.5, 1.5), {"above": 0}, "confirmed"), (Interval(-1, -1.5, -0.5), {"above": 0}, "refuted"),
    (Interval(0, -1, 1), {"above": 0}, "undecided"), (Interval(1, np.nan, np.nan), {"above": 0}, "undecided"),
    (Interval(-1, -1.5, -0.5), {"below": 0}, "confirmed"), (Interval(1, 0.5, 1.5), {"below": 0}, "refuted"),
    (Interval(0.001, -0.004, 0.006), {"above": 0, "refuted_below": 0.01}, "refuted"),
    (Interval(0.005, -0.004, 0.014), {"above": 0, "refuted_below": 0.01}, "undecided"),
    (Interval(np.nan, np.nan, np.nan), {"above": 0}, "undecided"),
])
def test_verdicts(value, bounds, expected):
    claim = weigh("text", PLAIN, value, "It is {}", **bounds)
    assert claim.verdict == expected and claim.reason.endswith(".")


def test_a_collapsed_runs_last_drawings_stand_for_the_rest(settings):
    points = Results(settings).points(PLAIN, 1e-3, 0)
    assert list(points) == judged_steps(settings) and points[80] is points[48] and points[80]["step"] < 80


def test_seed_0_chooses_and_the_further_seeds_are_reported(settings):
    results = Results(settings)
    assert results.best(PLAIN) == Cell(3e-5, 80) and results.best(SAFE) == Cell(1e-4, 80)
    assert results.best(PLAIN, SHORT) == Cell(3e-5, judged_steps(settings, SHORT)[-1])
    assert results.gain(PLAIN, Cell(3e-5, 80)) == pytest.approx({1: 0.061, 2: 0.062, 3: 0.063})


def test_a_longer_run_holds_a_shorter_ones_record(settings):
    run = Run(PLAIN, 3e-5, SEED, SHORT)
    assert is_done(run, settings) and not record_path(run, settings).is_file()
    assert not is_done(run._replace(rate=2e-5), settings)


def test_room_is_where_the_score_falls_to_the_bases(settings):
    results = Results(settings)
    rate, beyond = results.largest_good_rate(PLAIN, 0)  # from +0.06 at 3e-5 to -0.02 at 1e-4
    assert rate == pytest.approx(np.exp(np.log(3e-5) * 0.25 + np.log(1e-4) * 0.75)) and not beyond
    room, beyond = results.room(SAFE, PLAIN)
    assert 4 < room.low < room.mean < room.high < 6 and not beyond
    assert results.largest_good_rate(Config(WORLD, "ipo", "plain"), 0) is None


def test_claims_of_a_world_whose_truth_is_known(settings):
    results = Results(settings)
    assert harmful_rate(results, PLAIN) == 1e-4
    verdicts = {claim.text: claim.verdict for claim in claims_in(results, PLAIN)}
    assert verdicts.pop("Its best is at least as good as plain's best") == "confirmed"
    assert set(verdicts.values()) == {"confirmed"} and len(verdicts) == 7


def test_the_report_of_a_part_says_what_is_missing(settings):
    write_report(settings)
    output = Path(settings.output)
    text = (output / "claims.md").read_text()
    assert "28 of 28" in text and "| 0 of 30 |" in text and "| safeguarded | 1e-4 | 80 |" in text
    for name in ("quality", "map", "drawings"):
        assert (output / "images" / f"claims_sd15_off-policy_{name}.png").stat().st_size > 5000


def test_another_objective_has_a_frontier_of_its_own_beside_training_on_winners(tmp_path):
    settings = Settings(output=str(tmp_path))
    dmpo = Config(WORLD, "dmpo", "plain")
    (tmp_path / "runs" / WORLD.name).mkdir(parents=True)
    write_json(base_path(WORLD, settings), {"scores": [BASE, BASE]})
    for config, end in ((dmpo, 0.84), (dmpo.with_variant("safeguarded"), 0.86), (PLAIN.with_variant("winners only"), 0.81)):
        path = record_path(Run(config, 3e-5, SEED), settings)
        write_json(path, made := record(end, SEED, judged_steps(settings), 1.0))
        np.savez(path.with_suffix(".npz"), **{str(p["step"]): np.zeros((2, 32, 32, 3), np.uint8) for p in made["points"]})
    claims = {claim.text: claim for claim in claims_in(Results(settings), dmpo)}
    assert claims["Training on winners alone is not enough"].shown == "+0.050"
    write_report(settings)
    text = (tmp_path / "claims.md").read_text()
    assert "## The frontier: DMPO, off-policy pairs" in text and "| winners only | 3e-5 |" in text
    assert "The frontier: noise prediction" not in text and (tmp_path / "images" / "claims_dmpo_quality.png").is_file()


@pytest.mark.parametrize("rates", [[1e-4, 3e-5], [3e-5, 3e-5]])
def test_a_world_alone_is_reported_also_before_plain_and_safeguarded_have_a_rate_in_common(rates, tmp_path):
    settings = Settings(output=str(tmp_path))
    (tmp_path / "runs" / FLOW.name).mkdir(parents=True)
    write_json(base_path(FLOW, settings), {"scores": [BASE, BASE]})
    for variant, rate in zip(("plain", "safeguarded"), rates):
        path = record_path(Run(Config(FLOW, "diffusion-dpo", variant), rate, SEED), settings)
        write_json(path, made := record(0.82, SEED, judged_steps(settings), 1.0))
        np.savez(path.with_suffix(".npz"), **{str(p["step"]): np.zeros((2, 32, 32, 3), np.uint8) for p in made["points"]})
    write_report(settings)
    text = (tmp_path / "claims.md").read_text()
    assert "The frontier: flow matching" in text and "sd3_off-policy_map.png" in text and "base scores" not in text
    assert ("sd3_off-policy_quality.png" in text) == (rates[0] == rates[1])


def test_the_ranking_has_the_best_first(settings):
    results = Results(settings)
    assert set(ranking(results)) == {PLAIN, SAFE}
    gains = [np.mean(list(results.gain(config, results.best(config, SHORT)).values())) for config in ranking(results)]
    assert gains == sorted(gains, reverse=True)
