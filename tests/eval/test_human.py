"""Votes in a comparison: planted preferences give that win rate, interval and agreement, and bad votes one line."""

import json
import random

import numpy as np
import pytest
from scipy.stats import binom

from common.errors import UserError
from common.votes import read_votes
from eval import judge
from eval.human import human_lines, human_row
from eval.scores import ScoredImage
from tests.votes import prefer, write_votes

N = 400


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """N pairs of images that were never drawn, "metric" preferring A in every second."""
    folder = tmp_path_factory.mktemp("images")
    return [(f"prompt {k}", *(ScoredImage(f"prompt {k}", "", folder / f"{side}{k}.png", sha256=f"{side}{k:063}",
                                          scores={"metric": float(side == "ab"[k % 2])}) for side in "ab")) for k in range(N)]


@pytest.fixture
def page_of(tmp_path):
    """page_of(pairs): a page of them, its pictures empty."""
    from common.votes import plan_digest
    from eval.pages import write_page

    def make(pairs, repeat=False):
        digests = {image.path: image.sha256 for _, *both in pairs for image in both}
        shown = [(judge.Candidate("A", p, a.path), judge.Candidate("B", p, b.path)) for p, a, b in pairs]
        plan, paths = judge.make_plan(shown, digests, random.Random(0), repeat)
        return write_page(tmp_path / "page.html", "judge.html.j2", pairs=len(plan["pairs"]),
                          data={"page": plan_digest(plan), "plan": plan, "images": [""] * len(paths)})
    return make


def planted(share: float, seed: int = 0):
    """A judge to whom A is better with this probability."""
    rng = random.Random(seed)
    return lambda left, right, _: "left" if (left["model"] == "A") == (rng.random() < share) else "right"


def test_a_planted_preference_gives_that_win_rate_and_interval(pairs, page_of, tmp_path):
    votes = write_votes(page_of(pairs), tmp_path / "v.json", planted(0.7))
    row = human_row(read_votes([votes]), pairs, ["metric"], True)
    assert row["win_rate_a_over_b"] == pytest.approx(0.7, abs=0.06) and row["total_votes"] == row["pairs_judged"] == N
    low, high = binom.ppf([0.025, 0.975], N, row["win_rate_a_over_b"]) / N
    assert row["win_rate_ci95"] == pytest.approx([low, high], abs=0.006)
    assert row["sign_test_p"] == pytest.approx(2 * binom.sf(row["wins_a"] - 1, N, 0.5)) and row["sign_test_p"] < 1e-6
    assert row["by_pair"][0] in ([1, 0, 0], [0, 1, 0]) and row["judges_agree"] is None
    swapped = human_row(read_votes([votes]), [(p, b, a) for p, a, b in pairs], ["metric"], True)
    assert swapped["win_rate_ci95"] == pytest.approx([1 - side for side in row["win_rate_ci95"][::-1]], abs=1e-12)
    assert (swapped["wins_a"], swapped["wins_b"]) == (row["wins_b"], row["wins_a"])


def test_judges_and_metrics_agree_as_planted(pairs, page_of, tmp_path):
    page = page_of(pairs, repeat=True)
    by_metric = {a.sha256: a.scores["metric"] for _, *both in pairs for a in both}
    best = lambda left, right, _: "left" if by_metric[left["sha256"]] > by_metric[right["sha256"]] else "right"
    ties = lambda left, right, prompt: "bad" if int(prompt.split()[1]) % 4 == 0 else best(left, right, prompt)
    files = [write_votes(page, tmp_path / "1.json", best, "anna"), write_votes(page, tmp_path / "2.json", ties, "ben"),
             write_votes(page, tmp_path / "0.json", best, "anna", limit=10)]  # saved in between
    row = human_row(read_votes(files), pairs, ["metric"], True)
    assert row["judges"] == 2 and row["total_votes"] == 2 * N and row["both_bad"] == N // 4 == row["ties"]
    assert row["judges_agree"] == {"compared": N, "share": 0.75}
    assert row["metrics_agree"]["metric"]["share"] == 1.0 and row["metrics_agree"]["metric"]["votes"] == 2 * N - N // 4
    assert row["repeated"] == {"pairs": 40, "alike": 40}
    assert any("100.0% (99% to 100%)" in line for line in human_lines(row, {"metric": "Metric"}))
    excluded = human_row(read_votes(files), pairs, ["metric"], False)
    assert excluded["win_rate_a_over_b"] == row["wins_a"] / (row["wins_a"] + row["wins_b"])


def test_one_is_singular(pairs, page_of, tmp_path):
    votes = write_votes(page_of(pairs[:1]), tmp_path / "v.json", lambda *_: "bad")
    assert human_lines(human_row(read_votes([votes]), pairs[:1], [], True), {})[0] == (
        "Human: 1 vote by 1 judge on 1 pair; 1 vote says both bad")


def test_votes_of_changed_gone_or_other_images_are_one_line(pairs, page_of, tmp_path, capsys):
    ballots = read_votes([write_votes(page_of(pairs[:10]), tmp_path / "v.json", prefer("A", "B"))])
    changed = [(p, a, ScoredImage(p, "", b.path, sha256="f" * 64, scores=b.scores)) for p, a, b in pairs[:10]]
    with pytest.raises(UserError, match=r"b\d.png has changed since it was judged"):
        human_row(ballots, changed, [], True)
    with pytest.raises(UserError, match="none of the 10 pairs judged in .*v.json is of these images"):
        human_row(ballots, pairs[20:], [], True)
    row = human_row(ballots, pairs[:4], [], True)
    assert row["total_votes"] == 4 and "6 of 10 judged pairs are of other images" in capsys.readouterr().err
    crossed = [(p, pairs[0][1], b) for p, _, b in pairs[1:3]]
    with pytest.raises(UserError, match="of no pair of this comparison|none of the"):
        human_row(ballots, crossed, [], True)


@pytest.mark.parametrize("damage, why", [
    (lambda v: v["answers"].__setitem__(0, "left" if v["answers"][0] == "right" else "right"), "its answers were edited"),
    (lambda v: v["answers"].append("left"), "its answers were edited"),
    (lambda v: v["judge"].update(id="someone else"), "its answers were edited"),
    (lambda v: v["plan"]["pairs"][0].update(prompt="another"), "its plan is not that of its page"),
    (lambda v: v["plan"]["images"].reverse(), "its plan is not that of its page"),
    (lambda v: v.update(page="0" * 16), "its plan is not that of its page"),
    (lambda v: v.pop("plan"), "is no votes file"), (lambda v: v.update(answers=[1, 2]), "is no votes file"),
    (lambda v: v.update(judge="anna"), "is no votes file"), (lambda v: v.update(answers=7), "is no votes file"),
])
def test_an_edited_votes_file_is_one_line(damage, why, pairs, page_of, tmp_path):
    path = write_votes(page_of(pairs[:3]), tmp_path / "v.json", prefer("A", "B"))
    votes = json.loads(path.read_text())
    damage(votes)
    path.write_text(json.dumps(votes))
    with pytest.raises(UserError, match=why):
        read_votes([path])


def test_no_votes_at_all(pairs, page_of, tmp_path):
    empty = write_votes(page_of(pairs[:3]), tmp_path / "v.json", prefer("A", "B"), limit=0)
    (tmp_path / "text.json").write_text("[]")
    for path, why in ((empty, "holds no vote"), (tmp_path / "text.json", "is no votes file"), (tmp_path / "no.json", "no votes at")):
        with pytest.raises(UserError, match=why):
            read_votes([path])


@pytest.mark.usefixtures("shared_metrics")
def test_compare_shows_the_human_row(make_manifest, metrics_config, tmp_path, capsys):
    from eval import compare
    manifests = [make_manifest(name, [f"p{k}" for k in range(8)], seed=seed) for seed, name in enumerate("ab")]
    judge.main(["--manifests", *manifests, "--output", tmp_path / "page.html"])
    votes = write_votes(tmp_path / "page.html", tmp_path / "v.json", prefer("a", "b"))
    assert compare.main(["--json_a", manifests[0], "--json_b", manifests[1], "--votes", votes, "--metrics", "clip", "--device", "cpu",
                         "--metrics_config", metrics_config, "--outdir", tmp_path / "vs"]) == 0
    [folder] = (tmp_path / "vs").iterdir()
    human = json.loads((folder / "summary.json").read_text())["human"]
    assert (human["wins_a"], human["wins_b"], human["win_rate_ci95"]) == (8, 0, [0.025 ** (1 / 8), 1.0])
    told, page = capsys.readouterr().out, (folder / "report.html").read_text()
    assert "| Human " in told and "100.00%" in told and "8 votes by 1 judge" in told and "8 votes by 1 judge" in page
    assert human["sign_test_p"] == 2 / 2**8 and np.isclose(human["metrics_agree"]["clip"]["votes"], 8)
