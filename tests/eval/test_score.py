"""Scoring manifests: one read an image, kept scores, the published lines, and what goes wrong."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from common.errors import UserError
from eval import score, scores, scoring
from eval.metrics import METRICS
from eval.metrics.clip import CLIPScore

pytestmark = pytest.mark.usefixtures("shared_metrics")

PROMPTS = ["a red cat", "a dog", "a dog", "naïve 東京", "a house"]


def run(manifests, metrics_config, *more) -> int:
    return score.main([str(word) for word in ("--manifests", *manifests, "--metrics_config", metrics_config, "--device",
                                              "cpu", *more)])


def kept(manifest: Path) -> dict:
    return json.loads(manifest.with_name(f"{manifest.stem}_scores.json").read_text())


def test_scores_lines_and_tables(make_manifest, metrics_config, load_once, capsys, tmp_path):
    manifest = make_manifest("a", PROMPTS)
    log_file = tmp_path / "logs" / "joint_test_64.log"
    assert run([manifest], metrics_config, "--log_file", log_file, "--batch_size", 2) == 0
    content = kept(manifest)
    images = [Image.open(manifest.parent / image["gen_image_path"]) for image in content["images"]]
    for name, label in (("pickscore", "PickScore"), ("hpsv2", "HPSv2"), ("aesthetics", "AesScore"),
                        ("clip", "CLIPScore"), ("imagereward", "ImageReward")):
        expected = load_once(name, config=metrics_config).score(images, PROMPTS)
        got = [image["scores"][name] for image in content["images"]]
        assert got == pytest.approx(expected.tolist(), abs=1e-5)
        mean = sum(got) / len(got)
        assert content["metrics"][name]["mean"] == pytest.approx(mean)
        log = log_file.read_text()
        assert f"FinalResults {label} for own : {mean:.4f}\n" in log
        assert re.search(rf"^\| own +\| {label} +\| {re.escape(f'{mean:.4f}')} +\|$", log, re.MULTILINE)
    assert re.search(r"^\| Prompt +\| Predictor +\| Score +\|$", log, re.MULTILINE)
    assert log in capsys.readouterr().out


def test_each_image_is_read_once_and_scored_once(make_manifest, metrics_config, monkeypatch):
    manifest, reads, loads = make_manifest("a", PROMPTS), [], []
    opened, load = Image.open, scoring.load_metric
    monkeypatch.setattr(scoring.Image, "open", lambda *a, **k: reads.append(a) or opened(*a, **k))
    monkeypatch.setattr(scoring, "load_metric", lambda *a: loads.append(a[0]) or load(*a))
    run([manifest], metrics_config, "--metrics", "clip", "pickscore")
    assert len(reads) == len(PROMPTS) and loads == ["clip", "pickscore"]
    run([manifest], metrics_config, "--metrics", "clip", "pickscore")
    assert len(reads) == len(PROMPTS) and loads == ["clip", "pickscore"]  # all kept: no decoding, no model
    run([manifest], metrics_config, "--metrics", "aesthetics")
    assert set(kept(manifest)["metrics"]) == {"clip", "pickscore", "aesthetics"}  # a subset leaves the others


def test_kept_scores_follow_image_content_and_metric_version(make_manifest, metrics_config, monkeypatch):
    manifest = make_manifest("a", PROMPTS)
    run([manifest], metrics_config, "--metrics", "aesthetics")
    before = kept(manifest)
    image = manifest.parent / before["images"][3]["gen_image_path"]
    Image.new("RGB", (64, 64), "red").save(image)
    scored = []
    monkeypatch.setattr(scoring, "score_images", lambda metric, images, size, of=scoring.score_images:
                        scored.append(len(images)) or of(metric, images, size))
    run([manifest], metrics_config, "--metrics", "aesthetics")
    after = kept(manifest)
    changed = [a["scores"] != b["scores"] for a, b in zip(before["images"], after["images"])]
    assert changed == [False, False, False, True, False] and scored == [1]
    monkeypatch.setitem(METRICS, "aesthetics", METRICS["aesthetics"]._replace(revision=2))
    run([manifest], metrics_config, "--metrics", "aesthetics")
    assert scored == [1, 5]
    manifest.with_name(f"{manifest.stem}_scores.json").write_text("{damaged")
    assert run([manifest], metrics_config, "--metrics", "aesthetics") == 0


def test_kept_scores_that_are_no_numbers_are_not_used_and_those_of_unknown_metrics_stay(make_manifest, metrics_config, monkeypatch):
    manifest = make_manifest("a", PROMPTS)
    run([manifest], metrics_config, "--metrics", "aesthetics")
    right, scored = kept(manifest), []
    wrong = json.loads(json.dumps(right))
    wrong["metrics"]["beauty"] = wrong["metrics"]["aesthetics"]
    for image, fault in zip(wrong["images"], ["5.5", float("nan"), None, 10**400]):
        image["scores"] = {"aesthetics": fault}
    for image in wrong["images"]:
        image["scores"]["beauty"] = 1.0
    manifest.with_name(f"{manifest.stem}_scores.json").write_text(json.dumps(wrong))
    monkeypatch.setattr(scoring, "score_images", lambda metric, images, size, of=scoring.score_images:
                        scored.append(len(images)) or of(metric, images, size))
    assert run([manifest], metrics_config, "--metrics", "aesthetics") == 0
    found = kept(manifest)
    assert found["metrics"].pop("beauty") == {**right["metrics"]["aesthetics"], "mean": 1.0}
    assert [image["scores"].pop("beauty") for image in found["images"]] == [1.0] * 5
    assert found == right and scored == [4]


def test_scorings_at_one_time_keep_each_others_scores(make_manifest, metrics_config, monkeypatch):
    manifest = make_manifest("a", PROMPTS)

    def meanwhile(metric, images, size, of=scoring.score_images):
        monkeypatch.setattr(scoring, "score_images", of)
        assert run([manifest], metrics_config, "--metrics", "pickscore") == 0
        of(metric, images, size)

    monkeypatch.setattr(scoring, "score_images", meanwhile)
    assert run([manifest], metrics_config, "--metrics", "clip") == 0
    assert set(kept(manifest)["metrics"]) == {"clip", "pickscore"}
    assert all(image["scores"].keys() == {"clip", "pickscore"} for image in kept(manifest)["images"])


def test_nothing_is_written_where_nothing_is_new(make_manifest, metrics_config, monkeypatch):
    manifest = make_manifest("a", PROMPTS)
    run([manifest], metrics_config, "--metrics", "aesthetics", "clip")
    monkeypatch.setattr(scores, "write_json", lambda *_: pytest.fail("written: the folder may be read-only"))
    assert run([manifest], metrics_config, "--metrics", "clip") == 0


def test_a_metric_without_weights_fails_alone(make_manifest, metrics_config, tmp_path, capsys):
    config = tmp_path / "metrics.yaml"
    folder = metrics_config.parent
    config.write_text(metrics_config.read_text().replace("model: pickscore", "model: nobody/nothing")
                      .replace(": aesthetics", f": {folder}/aesthetics").replace(": clip/", f": {folder}/clip/")
                      .replace("processor: pickscore", f"processor: {folder}/pickscore"))
    manifest = make_manifest("a", PROMPTS)
    assert run([manifest], config, "--metrics", "pickscore", "aesthetics", "clip") == 1
    captured = capsys.readouterr()
    assert "error: pickscore was not scored" in captured.err and "failed" in captured.out
    assert "FinalResults CLIPScore" in captured.out and "FinalResults PickScore" not in captured.out
    assert set(kept(manifest)["metrics"]) == {"aesthetics", "clip"}


@pytest.mark.parametrize("metric, of", [
    ("clip", "eval.metrics.clip.CLIPScore._score"), ("oracle", "shapes.metric.Oracle.score")])
def test_a_score_that_is_no_number_fails_its_metric(metric, of, make_manifest, metrics_config, monkeypatch, capsys):
    manifest = make_manifest("a", PROMPTS)
    with monkeypatch.context() as patch:
        patch.setattr(of, lambda self, images, prompts: torch.full((len(prompts),), float("nan")))
        assert run([manifest], metrics_config, "--metrics", metric, "aesthetics") == 1
    assert f"error: {metric} was not scored" in (said := capsys.readouterr().err) and "is nan, no finite number" in said
    assert set(kept(manifest)["metrics"]) == {"aesthetics"}


def test_what_was_scored_before_a_scorer_fails_is_kept(make_manifest, metrics_config, monkeypatch):
    manifest, scored = make_manifest("a", PROMPTS), []

    def score(self, pixels, prompts, of=CLIPScore.score_pixels):
        if len(scored) == 1:
            scored.append("broken")
            raise KeyboardInterrupt
        scored.append(len(prompts))
        return of(self, pixels, prompts)

    monkeypatch.setattr(CLIPScore, "score_pixels", score)
    with pytest.raises(KeyboardInterrupt):
        run([manifest], metrics_config, "--metrics", "clip", "--batch_size", "2")
    found = kept(manifest)
    assert [len(image["scores"]) for image in found["images"]] == [1, 1, 0, 0, 0] and found["metrics"]["clip"]["mean"] is None
    assert run([manifest], metrics_config, "--metrics", "clip", "--batch_size", "2") == 0
    assert scored == [2, "broken", 2, 1] and isinstance(kept(manifest)["metrics"]["clip"]["mean"], float)


def test_oracle_stands_beside_the_others(make_manifest, metrics_config, capsys):
    manifest = make_manifest("a", ["a red circle on a blue background", "a green square on a white background"])
    assert run([manifest], metrics_config, "--metrics", "aesthetics", "oracle") == 0
    assert "FinalResults Oracle for own" in capsys.readouterr().out
    other = make_manifest("b", ["no drawing at all"])
    assert run([other], metrics_config, "--metrics", "aesthetics", "oracle") == 1  # it fails alone
    assert set(kept(other)["metrics"]) == {"aesthetics"}


def test_missing_and_unreadable_images_are_listed_and_counted(make_manifest, metrics_config, capsys):
    manifest = make_manifest("a", PROMPTS)
    folder = next(manifest.parent.glob("own*cfg"))
    (folder / "1_64x64.png").unlink()
    with pytest.raises(UserError, match="1 of 5 images are missing or unreadable"):
        run([manifest], metrics_config)
    (folder / "3_64x64.png").write_bytes((folder / "3_64x64.png").read_bytes()[:300])  # cut short
    assert run([manifest], metrics_config, "--skip_missing", "--metrics", "clip") == 0
    captured = capsys.readouterr()
    assert "1_64x64.png: no such file" in captured.err and "3_64x64.png: " in captured.err
    assert "2 of 5 images are missing or unreadable: left out" in captured.err
    assert len(kept(manifest)["images"]) == 3
    for path in folder.glob("*.png"):
        path.unlink()
    with pytest.raises(UserError, match="none of the 5 images"):
        run([manifest], metrics_config, "--skip_missing")


def test_formats_that_run_other_programs_are_not_opened(make_manifest, metrics_config, monkeypatch):
    manifest = make_manifest("a", PROMPTS[:1])
    image = next(manifest.parent.glob("own*cfg/*.png"))
    Image.new("RGB", (64, 64)).save(image, "EPS")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was run"))
    with pytest.raises(UserError, match="1 of 1 images are missing or unreadable"):
        run([manifest], metrics_config, "--metrics", "aesthetics")


@pytest.mark.parametrize("content, said", [
    (None, "no manifest at"), ("[]", "lists no image"), ("{", "no JSON manifest"), ("{}", "must be a JSON list"),
    ('[{"prompt": "x"}]', "entry 1 has no gen_image_path"), ('["x"]', "entry 1 has no prompt"),
])
def test_bad_manifests(content, said, metrics_config, tmp_path):
    manifest = tmp_path / "m.json"
    if content is not None:
        manifest.write_text(content)
    with pytest.raises(UserError, match=said):
        run([manifest], metrics_config)


@pytest.mark.parametrize("more, said", [
    (["--metrics", "beauty"], "no metric named beauty"), (["--batch_size", 0], "--batch_size must be .* at least 1"),
    (["--device", "cuda"], "no GPU can be used here"),
])
def test_bad_options(more, said, make_manifest, metrics_config, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=said):
        run([make_manifest("a", PROMPTS)], metrics_config, *more)


@pytest.mark.parametrize("log_file, said", [("a.log/x.log", "cannot be made"), (".", "is a folder")])
def test_a_log_that_cannot_be_is_reported_before_scoring(log_file, said, make_manifest, metrics_config, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "score_manifests", lambda *_: pytest.fail("scored"))
    (tmp_path / "a.log").write_text("")
    with pytest.raises(UserError, match=f"--log_file: .*{said}"):
        run([make_manifest("a", PROMPTS)], metrics_config, "--log_file", tmp_path / log_file)


def test_relative_paths_are_taken_from_the_manifest_then_from_the_working_directory(make_manifest, metrics_config,
                                                                                    tmp_path, monkeypatch):
    manifest = make_manifest("a", PROMPTS)
    moved = tmp_path / "moved"
    manifest.parent.rename(moved)
    assert run([moved / manifest.name], metrics_config, "--metrics", "aesthetics") == 0
    alone = tmp_path / "alone.json"
    entries = json.loads((moved / manifest.name).read_text())
    alone.write_text(json.dumps([entry | {"gen_image_path": f"moved/{entry['gen_image_path']}"} for entry in entries]))
    (tmp_path / "deep").mkdir()
    alone.rename(tmp_path / "deep" / "alone.json")
    monkeypatch.chdir(tmp_path)
    assert run(["deep/alone.json"], metrics_config, "--metrics", "aesthetics") == 0  # the official form


def test_two_runs_of_one_group_are_told_apart(make_manifest, metrics_config, capsys):
    a, b = make_manifest("a", PROMPTS), make_manifest("b", PROMPTS, seed=1)
    assert run([a, b], metrics_config, "--metrics", "clip") == 0
    said = capsys.readouterr().out
    for manifest in (a, b):
        assert f"FinalResults CLIPScore for own ({manifest.parent}) : " in said
