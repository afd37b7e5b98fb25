"""A/B comparison: pairs, tables recomputed by hand, mirrored by swapping, and the files of the published form."""

import json
import re

import pytest

from common.errors import UserError
from eval import compare
from eval.compare import new_folder, pair_up
from eval.report import write_report

pytestmark = pytest.mark.usefixtures("shared_metrics")

PROMPTS = ["a red cat", "a dog", "a dog", "naïve 東京", "<b>bold</b>", "z last"]
METRICS = ["pickscore", "hpsv2", "aesthetics", "clip", "imagereward"]


@pytest.fixture
def manifests(make_manifest):
    return make_manifest("a", PROMPTS), make_manifest("b", PROMPTS[::-1], seed=1)


def run(a, b, metrics_config, outdir, *more, labels=("A one", "B/two")):
    code = compare.main([str(word) for word in (
        "--json_a", a, "--json_b", b, "--label_a", labels[0], "--label_b", labels[1], "--metrics_config", metrics_config,
        "--outdir", outdir, "--device", "cpu", *more)])
    folders = sorted(outdir.iterdir(), key=lambda folder: folder.stat().st_mtime_ns)
    folder = folders[-1]
    return code, folder, json.loads((folder / "summary.json").read_text())


def read_pairs(folder, metric) -> dict:
    return json.loads((folder / f"pair_{metric}.json").read_text())


def test_tables_agree_with_per_image_scores(manifests, metrics_config, tmp_path, capsys):
    code, folder, summary = run(*manifests, metrics_config, tmp_path / "vs")
    assert code == 0 and folder.name.startswith("A_one_vs_B_two_") and (folder / "report.html").exists()
    scores = []
    for manifest in manifests:
        content = json.loads(manifest.with_name(f"{manifest.stem}_scores.json").read_text())
        by_prompt = {}
        for image in content["images"]:
            by_prompt.setdefault(image["prompt"], []).append(image["scores"])
        scores.append(by_prompt)
    assert [row["metric"] for row in summary["metrics"]] == METRICS
    for row in summary["metrics"]:
        metric, pair_file = row["metric"], read_pairs(folder, row["metric"])
        expected = [(prompt, a[metric], b[metric]) for prompt in sorted(scores[0])
                    for a, b in zip(scores[0][prompt], scores[1][prompt])]
        assert [(r["prompt"], r["score_a"], r["score_b"]) for r in pair_file["results"]] == expected
        assert [r["pair_index"] for r in pair_file["results"]] == list(range(6))
        wins_a = sum(a > b for _, a, b in expected)
        wins_b = sum(a < b for _, a, b in expected)
        ties = 6 - wins_a - wins_b
        for found in (row, pair_file):
            assert (found["wins_a"], found["wins_b"], found["ties"], found["total_pairs"]) == (wins_a, wins_b, ties, 6)
            assert found["win_rate_a_over_b"] == (wins_a + ties / 2) / 6
        assert pair_file["mean_score_a"] == row["mean_a"] == pytest.approx(sum(a for _, a, _ in expected) / 6)
        assert {r["winner"] for r in pair_file["results"]} <= {"A one", "B/two", "tie"}
        assert row["win_rate_ci95"][0] <= row["win_rate_a_over_b"] <= row["win_rate_ci95"][1]
        margins = sorted((a - b for _, a, b in expected), reverse=True)
        assert [r["margin"] for r in row["biggest_wins_a"]] == [m for m in margins if m > 0]
        assert [r["margin"] for r in row["biggest_wins_b"]] == [m for m in margins[::-1] if m < 0]
    rates = [row["win_rate_a_over_b"] for row in summary["metrics"]]
    assert summary["averages"]["macro_win_rate_a_over_b"] == pytest.approx(sum(rates) / 5)
    assert summary["pair"] == {"model_a": "A one", "model_b": "B/two", "ties_policy": "half"}
    assert "PickScore" in capsys.readouterr().out


def test_swapping_mirrors_exactly(manifests, metrics_config, tmp_path):
    _, forth, summary = run(*manifests, metrics_config, tmp_path / "forth")
    _, back, mirrored = run(*manifests[::-1], metrics_config, tmp_path / "back", labels=("B/two", "A one"))
    for row, other in zip(summary["metrics"], mirrored["metrics"]):
        assert (row["wins_a"], row["wins_b"], row["ties"]) == (other["wins_b"], other["wins_a"], other["ties"])
        assert row["win_rate_a_over_b"] == pytest.approx(1 - other["win_rate_a_over_b"], abs=1e-15)
        assert row["win_rate_ci95"] == pytest.approx([1 - side for side in other["win_rate_ci95"][::-1]], abs=1e-15)
        assert (row["mean_a"], row["sign_test_p_holm"]) == (other["mean_b"], other["sign_test_p_holm"])
        for a, b in zip(read_pairs(forth, row["metric"])["results"], read_pairs(back, row["metric"])["results"]):
            assert (a["winner"], a["image_a"], a["score_a"]) == (b["winner"], b["image_b"], b["score_b"])


def test_a_model_against_itself_ties(make_manifest, metrics_config, tmp_path):
    a = make_manifest("a", PROMPTS)
    _, _, summary = run(a, a, metrics_config, tmp_path / "vs", "--metrics", "clip")
    assert (summary["metrics"][0]["ties"], summary["metrics"][0]["win_rate_a_over_b"]) == (6, 0.5)
    assert summary["metrics"][0]["win_rate_ci95"] == [0.5, 0.5]
    _, _, summary = run(a, a, metrics_config, tmp_path / "vs", "--metrics", "clip", "--ties_policy", "exclude")
    assert summary["metrics"][0]["win_rate_a_over_b"] == 0.5


def test_kept_scores_are_reused(manifests, metrics_config, tmp_path, monkeypatch):
    run(*manifests, metrics_config, tmp_path / "vs", "--metrics", "clip")
    monkeypatch.setattr("eval.scoring.load_metric", lambda *_: pytest.fail("scored again"))
    code, _, _ = run(*manifests, metrics_config, tmp_path / "vs", "--metrics", "clip")
    assert code == 0


def test_pairing():
    assert pair_up(["b", "a", "b", "c"], ["b", "b", "d", "a"], "prompt") == [("a", 1, 3), ("b", 0, 0), ("b", 2, 1)]
    assert pair_up(["b", "a"], ["x", "y", "z"], "index") == [("b", 0, 0), ("a", 1, 1)]
    with pytest.raises(UserError, match="--pair_by index"):
        pair_up(["a"], ["b"], "prompt")


def test_partial_overlap_is_reported(make_manifest, metrics_config, tmp_path, capsys):
    a, b = make_manifest("a", PROMPTS), make_manifest("b", PROMPTS[:2] + ["only in b"])
    _, _, summary = run(a, b, metrics_config, tmp_path / "vs", "--metrics", "clip")
    assert summary["pairing"] == {"by": "prompt", "pairs": 2, "left_out_for_missing_images": 0,
                                  "images_without_partner_a": 4, "images_without_partner_b": 1}
    assert "4 images of A one and 1 of B/two have no partner" in capsys.readouterr().err


def test_a_report_is_written_again_from_another_folder(manifests, metrics_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = [manifest.relative_to(tmp_path) for manifest in manifests]
    _, folder, _ = run(*relative, metrics_config, tmp_path / "vs", "--metrics", "clip")
    page = (folder / "report.html").read_text()
    assert page.count("data:image/jpeg") == 2 * len(PROMPTS)
    monkeypatch.chdir(folder)
    assert write_report(folder).read_text() == page


def test_a_single_prompt_has_no_interval(make_manifest, metrics_config, tmp_path, capsys):
    a, b = make_manifest("a", ["x"]), make_manifest("b", ["x"], seed=1)
    _, folder, summary = run(a, b, metrics_config, tmp_path / "vs", "--metrics", "clip")
    assert summary["metrics"][0]["win_rate_ci95"] is None
    assert re.search(r"^\| CLIPScore .*%\s+\| - ", capsys.readouterr().out, re.MULTILINE)
    assert '<span class="soft nowrap">-</span>' in (folder / "report.html").read_text()


def test_missing_images(manifests, metrics_config, tmp_path):
    next(manifests[0].parent.glob("own*cfg/1_*.png")).unlink()
    with pytest.raises(UserError, match="--skip_missing"):
        run(*manifests, metrics_config, tmp_path / "vs", "--metrics", "clip")
    _, _, summary = run(*manifests, metrics_config, tmp_path / "vs", "--metrics", "clip", "--skip_missing")
    assert summary["pairing"]["left_out_for_missing_images"] == 1 and summary["metrics"][0]["total_pairs"] == 5


@pytest.mark.parametrize("labels, said", [
    (("same", "same"), "two different names"), (("tie", "B"), "two different names"), (("", "B"), "two different names"),
    (("A", "\udcff"), "must be UTF-8"),
])
def test_bad_labels(labels, said, manifests, metrics_config, tmp_path):
    with pytest.raises(UserError, match=said):
        run(*manifests, metrics_config, tmp_path / "vs", labels=labels)


def test_long_labels_are_shortened_in_the_folders_name(tmp_path):
    folder = new_folder(str(tmp_path), "東" * 300, "b" * 300)
    assert folder.is_dir() and folder.name.startswith("東" * 26 + "_vs_" + "b" * 80 + "_")


def test_an_outdir_that_is_a_file_is_reported_before_scoring(manifests, metrics_config, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.scoring.score_manifests", lambda *_: pytest.fail("scored"))
    (tmp_path / "vs").write_text("")
    with pytest.raises(UserError, match="--outdir: the folder .*vs cannot be made"):
        run(*manifests, metrics_config, tmp_path / "vs")


def test_no_common_prompt(make_manifest, metrics_config, tmp_path):
    a, b = make_manifest("a", ["x", "y"]), make_manifest("b", ["p", "q"])
    with pytest.raises(UserError, match="no prompt in common.*--pair_by index"):
        run(a, b, metrics_config, tmp_path / "vs")
    _, _, summary = run(a, b, metrics_config, tmp_path / "vs", "--metrics", "clip", "--pair_by", "index")
    assert summary["metrics"][0]["total_pairs"] == 2


def test_a_metric_that_was_not_scored_is_named_on_the_page(manifests, metrics_config, tmp_path, capsys):
    code, folder, summary = run(*manifests, metrics_config, tmp_path / "out", "--metrics", "oracle", "clip")
    assert code == 1 and "error: oracle was not scored" in capsys.readouterr().err
    assert list(summary["not_scored"]) == ["oracle"] and [row["metric"] for row in summary["metrics"]] == ["clip"]
    assert "oracle was not scored: " in (folder / "report.html").read_text()
