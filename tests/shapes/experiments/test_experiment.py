"""The experiment's runs, from pairs to report, as small as they can be."""

import json
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import write_json
from shapes.experiment import run_options
from shapes.experiments import experiment as module
from shapes.experiments.experiment import experiment
from shapes.experiments.instruments import measure_pulls
from shapes.experiments.plan import DSPO_BETA, OBJECTIVES, PARTS, SHORT, VARIANTS, WORLD, World, Config, Run, Settings, configs, stages
from shapes.experiments.runs import base_path, record_path, train_run

SAFE = Config(WORLD, "diffusion-dpo", "safeguarded")


@pytest.mark.slow
def test_from_pairs_to_report_and_a_second_call_trains_nothing(tmp_path, monkeypatch):
    settings = Settings(output=str(tmp_path), smoke=True, parts=["frontier"], workers=1)
    settings.seeds = 0
    experiment(settings)
    text = (tmp_path / "claims.md").read_text()
    assert "| plain | 1e-4" in text and "| safeguarded | 1e-4" in text and "2 of 2" in text
    first = json.loads(record_path(run := Run(SAFE, 1e-4, 0), settings).read_text())["points"]
    assert [point["step"] for point in first] == [1, 2, 4, 6, 8, 10] and 0 < first[-1]["lambda"] < 1
    assert first[0]["winner"] == first[0]["loser"] == 0  # before the first step policy and reference are equal

    monkeypatch.setattr(module, "train_run", None)
    experiment(settings)
    again = train_run(run, settings)["points"]
    for point in first + again:
        del point["seconds"]
    assert again == first  # bit for bit

    for beta, direction in ((1e-3, 1.0), (DSPO_BETA, -1.0)):  # policy and reference are equal: the winner's pull is 1 - beta / 2
        pulls = measure_pulls(beta, settings)
        assert pulls["winner"][0] == pytest.approx(direction, abs=1e-3) and pulls["loser"][0] == 0.0
        assert (pulls["loser"][-1] > 0.01) == (beta == DSPO_BETA) and len(pulls["loser"]) == settings.instrument_steps

    write_json(base_path(WORLD, settings), {"scores": [2.0]})
    assert [point["step"] for point in train_run(run, settings)["points"]] == [1]  # collapsed, as it seems: it ends


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base", ["sd15", "sd3"])
def test_each_variant_is_a_choice_of_options(base, variant):
    words = Config(World(base, "off-policy"), "diffusion-dpo", variant).options()
    options = run_options(pretrained_model_name_or_path="base", cached_dataset="cache", **words)
    objective = options.objective
    assert objective.use_winner_preserving == (variant in ("safeguarded", "mu 0.6", "per pair"))
    assert (objective.fixed_lambda is not None) == (variant == "fixed lambda")
    assert (objective.winner_error_weight > 0) == (variant == "winner's error added")
    assert (objective.train_method == "sft") == (variant == "winners only")


def test_dspo_is_run_where_its_loser_matters_and_as_published():
    runs = [run for stage in stages("dspo", Settings()) for run in stage(lambda config, share: 3e-5)]
    options = {(run.config.variant, run.config.beta): run.config.options() for run in runs}
    assert options["plain", None] == {"train_method": "dspo"}
    assert options["plain", DSPO_BETA] == {"train_method": "dspo", "beta_dpo": DSPO_BETA}
    assert options["winner's error added", DSPO_BETA]["winner_error_weight"] == DSPO_BETA
    assert options["winners only", None] == {"train_method": "sft"}  # one run for all objectives
    assert {variant for variant, beta in options if beta} == set(VARIANTS) - {"winners only"}


@pytest.mark.parametrize("part", PARTS)
def test_no_run_is_planned_twice_and_names_differ(part):
    settings = Settings()
    runs = [run for stage in stages(part, settings) for run in stage(lambda config, share: 3e-5)]
    assert len({run.name for run in runs}) == len(runs)
    assert bool(runs) == (part != "lambda")


def test_the_ranking_holds_every_objective_plain_and_safeguarded():
    first, second = (stage(lambda config, share: 3e-5) for stage in stages("objectives", Settings()))
    assert {run.config for run in first} >= set(configs(WORLD, OBJECTIVES, ("plain", "safeguarded")))
    assert {run.seed for run in second} == {1, 2, 3} and {run.share for run in first + second} == {SHORT}


@pytest.mark.parametrize("asked, said", [
    ({"parts": ["frontiers"]}, "--parts has no frontiers: choose from frontier, variants"),
    ({"report": True}, "no runs in .* to report: leave --report out")])
def test_what_cannot_be_done_is_refused_and_leaves_nothing(asked, said, tmp_path):
    with pytest.raises(UserError, match=said):
        experiment(Settings(output=str(tmp_path), **asked))
    assert not list(Path(tmp_path).iterdir())


def test_full_is_every_part_and_then_the_long_runs():
    assert set(PARTS) - set(Settings().parts) == {"dmpo", "dspo"}
    full = Settings(full=True)
    long = full.long_runs
    assert full.parts == list(PARTS) and long.parts == ["frontier", "flow"] and long.steps == 300 > full.steps
    assert full.output == "output/claims" and long.output == Settings(long=True).output == "output/claims_long"
    assert min(long.rates) < min(full.rates) and max(long.rates) < max(full.rates) and not long.full
    assert Settings(full=True, smoke=True).long_runs.steps == 10
    assert Settings(long=True, steps=100).steps == 100 and Settings(long=True, steps=100).captions == 48


def test_runs_of_other_settings_are_not_taken_for_these(tmp_path):
    write_json(tmp_path / "settings.json", {"steps": 300, "pairs": 400})
    with pytest.raises(UserError, match="holds runs of other settings .--steps was 300, now 80.: name another --output"):
        experiment(Settings(output=str(tmp_path)))
