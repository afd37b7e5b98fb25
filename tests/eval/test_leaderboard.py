"""Planted strengths are recovered; tables by hand; the page in headless Chromium."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy.optimize import minimize

from common.errors import UserError
from eval import judge, leaderboard
from eval.bradley_terry import PRIOR, fit, fit_with_intervals
from eval.leaderboard import Row, make_leaderboard
from eval.scores import ScoredImage
from tests.votes import prefer, write_votes

STRENGTHS = np.array([0.9, 0.2, -0.3, -0.8])


def games(strengths: np.ndarray, prompts: int, seed: int = 0) -> np.ndarray:
    """(prompts, M, M): every two models play once per prompt."""
    rng, wins = np.random.default_rng(seed), np.zeros((prompts, len(strengths), len(strengths)))
    for i in range(len(strengths)):
        for j in range(i):
            won = rng.random(prompts) < 1 / (1 + np.exp(strengths[j] - strengths[i]))
            wins[:, i, j], wins[:, j, i] = won, ~won
    return wins


def test_the_fit_is_the_maximum_of_the_likelihood():
    rng = np.random.default_rng(0)
    for wins in (rng.integers(0, 30, (5, 5)) * (1 - np.eye(5)), np.triu(np.full((4, 4), 3000.0), 1), np.zeros((3, 3))):
        def loss(s):
            return (np.logaddexp(0, s[None] - s[:, None]) * wins).sum() + PRIOR / 2 * (np.logaddexp(0, s) + np.logaddexp(0, -s)).sum()
        best = minimize(loss, np.zeros(len(wins)), options={"gtol": 1e-9}).x
        assert fit(wins) == pytest.approx(best - best.mean(), abs=2e-3)
        assert np.isfinite(fit(wins)).all()
    assert fit(np.array([[0.0, 30.0], [10.0, 0.0]])) == pytest.approx([np.log(3) / 2, -np.log(3) / 2], abs=0.03)
    stack = np.stack([games(STRENGTHS, 20, seed).sum(0) for seed in range(3)])
    assert fit(stack) == pytest.approx(np.stack([fit(wins) for wins in stack]))


def test_planted_strengths_lie_in_their_intervals():
    inside = []
    for seed in range(10):
        found, intervals = fit_with_intervals(games(STRENGTHS, 200, seed))
        assert np.argsort(-found).tolist() == [0, 1, 2, 3] and found == pytest.approx(STRENGTHS, abs=0.35)
        inside += ((intervals[:, 0] < STRENGTHS) & (STRENGTHS < intervals[:, 1])).tolist()
    assert 33 <= sum(inside) <= 40  # 95% of 40, give or take
    assert fit_with_intervals(games(STRENGTHS, 1))[1] is None


def test_a_model_without_a_game_moves_no_other():
    wins = games(STRENGTHS, 50)
    strengths, intervals = fit_with_intervals(wins)
    more = np.insert(np.insert(wins, 1, 0, axis=1), 1, 0, axis=2)
    found, around = fit_with_intervals(more)
    assert np.isnan(found[1]) and np.isnan(around[1]).all()
    assert np.array_equal(np.delete(found, 1), strengths) and np.array_equal(np.delete(around, 1, axis=0), intervals)


def test_what_would_look_certain_has_no_interval():
    wins = games(STRENGTHS[:3], 50)
    wins[:, 0, 1:], wins[:, 1:, 0] = 1, 0  # of which the others' games alone differ
    assert np.isnan(fit_with_intervals(wins)[1]).all(1).tolist() == [True, False, False]
    in_order = np.repeat(np.triu(np.ones((3, 3)), 1)[None], 12, axis=0)
    found, intervals = fit_with_intervals(in_order)
    assert np.isfinite(found).all() and np.isnan(intervals).all()
    assert np.isnan(fit_with_intervals(np.full((12, 2, 2), 0.5) * (1 - np.eye(2)))[1]).all()  # ties alone


def planted_rows(prompts: int = 150) -> tuple[list[Row], list[str]]:
    """Scores with model k's mean at STRENGTHS[k], the models listed in another order."""
    rng, models = np.random.default_rng(0), ["third", "first", "fourth", "second"]
    means = dict(zip(["first", "second", "third", "fourth"], STRENGTHS))
    return [Row(f"g{k % 2}", f"p{k}", 0, {model: ScoredImage("", "", None, scores={
        name: float(rng.normal(means[model])) for name in ("clip", "pickscore")}) for model in models})
        for k in range(prompts)], models


def test_planted_models_come_in_their_order():
    rows, models = planted_rows()
    result = make_leaderboard(rows, models, ["clip", "pickscore"], [])
    assert result["models"] == ["first", "second", "third", "fourth"] and list(result["boards"]) == ["all metrics", "clip", "pickscore"]
    for board in result["boards"].values():
        assert board["strengths"] == sorted(board["strengths"], reverse=True)
        rates = np.array(board["win_rates"], dtype=float)
        assert np.isnan(np.diag(rates)).all() and rates[0, 3] > 0.7 and np.nansum(rates + rates.T) == pytest.approx(12)
        assert all(low < strength < high for strength, (low, high) in zip(board["strengths"], board["intervals"]))
    assert result["boards"]["all metrics"]["compared"][0][1] == 300
    first = result["means"]["g0"]["clip"][0]
    expected = np.mean([row.images["first"].scores["clip"] for row in rows if row.group == "g0"])
    assert first["mean"] == pytest.approx(expected) and first["images"] == 75 and first["ci95"][0] < expected < first["ci95"][1]


def test_untrained_metrics_count_for_nothing():
    rows, models = planted_rows(40)
    for row in rows:
        for model, image in row.images.items():
            image.scores["hpsv2"] = -image.scores["clip"]  # the reverse order
    result = make_leaderboard(rows, models, ["hpsv2", "clip", "pickscore"], [], untrained=["hpsv2"])
    without = make_leaderboard(rows, models, ["clip", "pickscore"], [])
    assert list(result["boards"]) == ["all metrics", "clip", "pickscore", "hpsv2"] and result["models"] == without["models"]
    assert {name: result["boards"][name] for name in without["boards"]} == without["boards"]
    assert result["boards"]["hpsv2"]["intervals"] is None and result["untrained"] == ["hpsv2"]
    told = "\n".join(leaderboard.board_lines(result))
    assert "HPSv2 (untrained)" in told and "Win rate of the row over the column, all metrics" in told
    none = make_leaderboard(rows, models, ["hpsv2"], [], untrained=["hpsv2"])
    assert none["models"] == models and "no metric is trained" in leaderboard.board_lines(none)[-1]


def test_a_board_without_votes_of_a_model(monkeypatch):
    rows, models = planted_rows(40)
    rest = make_leaderboard(rows, models, ["clip", "pickscore"], [])

    def votes(rows, models, ballots):  # of "first" and "fourth" alone, all for the first
        wins = np.zeros((len(rows), len(models), len(models)))
        wins[:, models.index("first"), models.index("fourth")] = 1
        return wins

    monkeypatch.setattr(leaderboard, "human_wins", votes)
    result = make_leaderboard(rows, models, ["clip", "pickscore"], ["a ballot"])
    human = result["boards"].pop("Human")
    assert result == rest and human["strengths"][1:3] == [None, None] and human["intervals"] == [None] * 4
    assert human["strengths"][0] == pytest.approx(-human["strengths"][3]) and human["strengths"][0] > 2
    json.dumps(human, allow_nan=False)
    result["boards"]["Human"] = human
    told = "\n".join(leaderboard.board_lines(result))
    assert f"| {human['strengths'][0]:+.2f} |" in " ".join(told.split()) and "| second | " in told and "| - |" in " ".join(told.split())
    assert "-: compared with no model" in told and "no interval: it won or lost everything, or all prompts agree" in told


def test_by_hand_with_ties_and_a_missing_image():
    image = lambda score: ScoredImage("", "", None, scores={"clip": score})
    rows = [Row("g", "x", 0, {"a": image(2.0), "b": image(1.0), "c": image(1.0)}), Row("g", "x", 1, {"a": image(0.0), "b": image(1.0)}),
            Row("g", "y", 0, {"a": image(1.0), "b": image(0.0)})]
    result = make_leaderboard(rows, ["a", "b", "c"], ["clip"], [])
    rates = result["boards"]["clip"]["win_rates"]
    assert result["models"][0] == "a" and rates[0][result["models"].index("b")] == pytest.approx(2 / 3)
    b, c = (result["models"].index(name) for name in "bc")
    assert rates[b][c] == rates[c][b] == 0.5 and result["boards"]["clip"]["compared"][b][c] == 1
    with pytest.raises(UserError, match="no two models have a prompt in common"):
        make_leaderboard([Row("g", "x", 0, {"a": image(1.0)}), Row("g", "y", 0, {"b": image(1.0)})], ["a", "b"], ["clip"], [])


@pytest.fixture
def brightness(monkeypatch):
    """Every metric is an image's brightness."""
    class Brightness:
        image_size, label = 224, "Brightness"

        def __init__(self, name):
            self.name = name

        def score_pixels(self, pixels, prompts):
            return pixels.float().mean((1, 2, 3))

    monkeypatch.setattr("eval.scoring.load_metric", lambda name, *_: Brightness(name))


def test_the_program_its_page_and_votes(make_manifest, brightness, browser, tmp_path, capsys):
    hostile = "<img src=x onerror=\"document.title='executed'\">"
    prompts = [hostile, *(f"p{k}" for k in range(14))]
    manifests = [make_manifest(name, prompts, seed=seed) for seed, name in enumerate(("dark", "bright <b>", "middle"))]
    rng = np.random.default_rng(0)
    for manifest, base in zip(manifests, (40, 200, 120)):
        for path in manifest.parent.rglob("*.png"):
            Image.fromarray(rng.integers(base - 20, base + 20, (64, 64, 3), dtype=np.uint8)).save(path)
    judge.main(["--manifests", *manifests, "--output", tmp_path / "page.html"])
    votes = write_votes(tmp_path / "page.html", tmp_path / "v.json", prefer("dark", "middle", "bright <b>"))
    flags = ["--manifests", *manifests, "--votes", votes, "--metrics", "clip", "pickscore", "--device", "cpu", "--output", tmp_path / "out"]
    assert leaderboard.main(flags) == 0
    result = json.loads((tmp_path / "out" / "leaderboard.json").read_text())
    assert result["models"] == ["bright <b>", "middle", "dark"]
    strengths = result["boards"]["Human"]["strengths"]
    assert strengths == sorted(strengths) and result["boards"]["Human"]["win_rates"][2][:2] == [1.0, 1.0]
    assert all(np.isfinite(strengths)) and result["means"]["own"]["clip"][0]["mean"] == pytest.approx(199.5, abs=2)
    told = capsys.readouterr().out
    assert "Bradley-Terry strength" in told and "| bright <b> | -          | 100.0% | 100.0% |" in told

    page = browser.new_page()
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("request", lambda request: request.url.startswith("http") and page.faults.append(request.url))
    page.goto((tmp_path / "out" / "leaderboard.html").as_uri())
    assert page.locator(".strength span").first.inner_text() == "bright <b>" and page.locator(".card").count() == 12
    assert page.locator("#tabs button").all_inner_texts() == ["all metrics", "CLIPScore", "PickScore", "Human"]
    page.locator("#tabs button", has_text="Human").click()
    assert " to " not in page.locator("#strengths").inner_text() and page.locator(".strength i").count() == 0
    assert "No interval: it won or lost everything, or all prompts agree." in page.locator("main").inner_text()
    assert page.locator("#rates tr").nth(3).locator("td").first.inner_text() == "100.0%"
    page.locator("#filter").fill("onerror")
    assert page.locator(".card .prompt").all_inner_texts() == [hostile] and page.locator(".card figure.won").count() == 1
    page.locator(".card .images").click()
    page.wait_for_function("[...document.querySelectorAll('dialog img')].filter(i => i.naturalWidth === 64).length === 3")
    page.keyboard.press("Escape")
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert max(page.locator(".wide tr").evaluate_all("all => all.map(row => row.clientHeight)")) < 60  # two lines, not four
    assert page.title() == "Leaderboard: bright <b>, middle, dark" and page.faults == []
    page.close()


def test_untrained_metrics_are_grey_on_the_page(make_manifest, brightness, tmp_path):
    marked = tmp_path / "marked.yaml"
    marked.write_text("pickscore: {untrained: true}\n")
    manifests = [make_manifest(name, ["x", "y", "x", "y"], seed) for seed, name in enumerate("ab")]
    leaderboard.main(["--manifests", *map(str, manifests), "--metrics", "pickscore", "clip", "--device", "cpu",
                      "--metrics_config", str(marked), "--output", str(tmp_path / "out")])
    page = (tmp_path / "out" / "leaderboard.html").read_text()
    assert "2 models, 2 prompts with images" in page, "of which each has two"
    assert page.count('<td class="untrained"') == 2 and 'class="untrained">PickScore (untrained)' in page and "Grey: models" in page
    assert list(json.loads((tmp_path / "out" / "leaderboard.json").read_text())["boards"]) == ["clip", "pickscore"]


def test_bad_input_is_one_line(make_manifest, tmp_path):
    a = make_manifest("a", ["x"])
    for flags, why in ((["--manifests", a], "needs two models"), (["--manifests", a, a, "--labels", "m", "m"], "needs two models"),
                       (["--manifests", a, tmp_path / "none.json"], "no manifest at"),
                       (["--manifests", a, a, "--labels", "m"], "names 1 models for 2")):
        with pytest.raises(UserError, match=why):
            leaderboard.main([*flags, "--output", tmp_path / "out"])
