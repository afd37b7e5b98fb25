"""A run's own picture and words: curves.png, train.log, what metrics.jsonl has besides the scalars; warnings."""

import json
from pathlib import Path

import pytest
from matplotlib import figure
from PIL import Image

from training.curves import draw_curves, idle, main, smoothed
from training.guards import DriftWatch
from training.optimizers import warn_of_tiny_rate


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_sd15, pairs_dir, train_run):
    folder = tmp_path_factory.mktemp("curves") / "run"
    train_run([f"--pretrained_model_name_or_path={tiny_sd15}", f"--train_data_dir={pairs_dir}", "--resolution=64", "--learning_rate=1e-3",
               "--mixed_precision=no", "--max_train_steps=24", "--watch_margin=1e-6", f"--output_dir={folder}"])
    return folder


def test_a_run_leaves_its_curves_and_its_log(run, tiny_sd15):
    with Image.open(run / "curves.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 400
    log = (run / "train.log").read_text()
    assert "Training" in log and "Done in " in log and "warning: step 20: margins" in log
    for command in ("python -m eval.generate --unet_path {} --prompts YOUR_PROMPTS.txt", "bash scripts/eval/test_sd15.sh {}"):
        assert f"{command.format(run / 'unet.pth')} --pretrained_model_name_or_path {tiny_sd15}\n" in log


def test_metrics_say_when_how_far_and_what_was_warned_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["pairs_seen"] for line in lines] == [2.0 * step for step in range(1, 25)]
    assert lines[-1]["epoch"] == pytest.approx(48 / 58) and lines[0]["time"] < lines[-1]["time"]
    assert [line["step"] for line in lines if "warnings" in line][0] == 20


def test_several_runs_are_drawn_together(run, tmp_path, program):
    program("training.curves", [run, run, "--output", tmp_path / "both.png"])
    with Image.open(tmp_path / "both.png") as picture:
        assert picture.format == "PNG"


def test_without_output_the_picture_lies_beside_the_first_run(tmp_path, monkeypatch, capsys):
    drawn = {}
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, aside, **how: drawn.update(picture=self) or aside.write_bytes(b""))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        lines = [{"step": step, "train_loss": 1.0, "lr": 1.0} | ({"warnings": ["x"]} if name == "b" else {}) for step in (1, 2)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.chdir(tmp_path)
    for runs, name in ((["a", "b"], "curves_compared.png"), (["b"], "curves.png")):
        monkeypatch.setattr("sys.argv", ["curves", *runs])
        main()
        assert capsys.readouterr().out == f"wrote {Path(runs[0], name)}\n" and Path(runs[0], name).is_file()
        legends = [text.get_text() for axes in drawn["picture"].axes if axes.get_legend() for text in axes.get_legend().get_texts()]
        assert legends.count("b, warned of") == (len(runs) > 1) and "a, warned of" not in legends


def test_a_folder_without_metrics_is_one_line(tmp_path, program):
    assert "error: no metrics.jsonl with steps" in program("training.curves", [tmp_path], expect=1)


def test_what_is_not_finite_or_idle_is_left_out(tmp_path):
    lines = [{"step": step, "train_loss": float("nan") if step == 2 else 1.0, "avg_lose_l_scale": 1.0} for step in (1, 2, 3)]
    draw_curves({"run": lines}, tmp_path / "curves.png")
    assert idle([("avg_lose_l_scale", "-", "")], {"run": lines})
    assert not idle([("avg_lose_l_scale", "-", "")], {"run": [*lines, {"step": 4, "avg_lose_l_scale": 0.5}]})


def test_a_curve_is_the_mean_of_its_parts():
    assert smoothed([(step, float(step)) for step in range(1, 41)])[:2] == [(1.5, 1.5), (3.5, 3.5)]


def test_a_safeguard_that_never_acts_is_warned_of_once():
    quiet = {"avg_lose_l_scale": 1.0, "margin_mean": 0.0, "margin_std": 0.0, "avg_win_diff_loss": 0.0, "ref_mse_unaccumulated": 1.0}
    watch = DriftWatch(0.1, 10.0, safeguarded=True)
    told = [step for step in range(1, 120) if watch(step, quiet)]
    assert told == [50]
    watch = DriftWatch(0.1, 10.0, safeguarded=True)
    watch(1, quiet | {"avg_lose_l_scale": 0.7})
    assert not any(watch(step, quiet) for step in range(2, 120))


@pytest.mark.parametrize("rate, steps, warned", [(1e-8, 2000, True), (2e-5, 2000, False), (1e-4, 3, True), (1e-8, 0, False)])
def test_a_rate_that_moves_nothing_is_warned_of(rate, steps, warned, capsys):
    import torch
    warn_of_tiny_rate([torch.full((4, 4), 1.0)], "adamw", rate, steps)
    assert ("nothing will be learned" in capsys.readouterr().err) == warned
    warn_of_tiny_rate([torch.full((4, 4), 1.0)], "sgd", rate, steps)
    assert not capsys.readouterr().err
