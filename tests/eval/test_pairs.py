"""Pairs from scored images: the rules by hand on ten prompts, and the folder that they leave."""

import json

import pyarrow.parquet as pq
import pytest

from common.errors import UserError
from common.train_options import DataOptions
from data.choosing import choose_pairs
from data.table import load_table
from eval import pairs
from eval.pair_rules import Found, find_pairs, histogram, ranks_of

# Ten prompts, three images each; a is the first metric, b the second.
TEN = [
    ((1, 2, 3), (1, 2, 3)), ((3, 2, 1), (3, 2, 1)), ((1, 2, 3), (3, 2, 1)), ((5, 5, 5), (1, 2, 3)), ((1, 1, 4), (1, 2, 3)),
    ((0, 4, 2), (2, 3, 1)), ((2, 2.5, 2), (9, 8, 7)), ((1, 3, 2), (1, 2, 2)), ((-1, 0, 1), (0, 0, 0)), ((7, 1, 4), (7, 4, 1)),
]

# By hand, (winner, loser) of each prompt.
BEST_WORST_A = [(2, 0), (0, 2), (2, 0), None, (2, 0), (1, 0), (1, 0), (1, 0), (2, 0), (0, 1)]
MARGIN_2_A = [{(2, 0)}, {(0, 2)}, {(2, 0)}, set(), {(2, 0), (2, 1)}, {(1, 0), (2, 0), (1, 2)}, set(), {(1, 0)}, {(2, 0)},
              {(0, 1), (0, 2), (2, 1)}]
AGREED = [{(2, 0), (2, 1), (1, 0)}, {(0, 1), (0, 2), (1, 2)}, set(), set(), {(2, 0), (2, 1)}, {(1, 0), (1, 2)}, {(1, 2)},
          {(1, 0), (2, 0)}, set(), {(0, 1), (0, 2)}]


def places(found):
    return {(pair.winner, pair.loser) for pair in found}


@pytest.mark.parametrize("number", range(10))
def test_the_rules_by_hand_on_ten_prompts(number):
    a, b = map(list, TEN[number])
    best = find_pairs({"a": a}, "best_worst")
    assert places(best) == ({BEST_WORST_A[number]} if BEST_WORST_A[number] else set())
    assert all(pair.gap == max(a) - min(a) for pair in best)
    assert places(find_pairs({"a": a}, "margin", min_gap=2)) == MARGIN_2_A[number]
    assert places(find_pairs({"a": a}, "all")) == {(i, j) for i in range(3) for j in range(3) if a[i] > a[j]}
    assert places(find_pairs({"a": a, "b": b}, "all", "agree")) == AGREED[number]


def test_several_metrics_vote_by_mean_rank():
    assert ranks_of([3, 1, 1, 9]) == [2 / 3, 1 / 6, 1 / 6, 1]
    # Ranks of the three: 0, 1/2, 1 and 0, 1, 1/2; the last two are equal and make no pair.
    found = find_pairs({"a": [10, 20, 30], "b": [0.1, 0.3, 0.2]}, "all")
    assert found == [Found(1, 0, 0.75), Found(2, 0, 0.75)]
    assert find_pairs({"a": [1, 2, 3], "b": [3, 2, 1]}, "all") == []


def test_the_histogram_counts_every_gap():
    lines = histogram([0.1, 0.1, 0.95, 1.0])
    assert len(lines) == 10 and lines[1].endswith("# 2") and lines[9].endswith("# 2") and lines[5].endswith(" 0")
    assert histogram([]) == []


@pytest.fixture
def scored(make_manifest):
    """score(name, values): a manifest of its two prompts' images in turn, and the scores file beside it."""

    def score(name, values, metric="pickscore", seed=0):
        manifest = make_manifest(name, ["a red cat", "a <b>dog</b>"] * (len(values) // 2), seed)
        entries = json.loads(manifest.read_text())
        for number, entry in enumerate(entries):
            entry["metadata"] = {"image_seed": number // 2}
        manifest.write_text(json.dumps(entries))
        from hashlib import sha256
        images = [{"prompt": entry["prompt"], "gen_image_path": entry["gen_image_path"], "scores": {metric: float(value)},
                   "sha256": sha256((manifest.parent / entry["gen_image_path"]).read_bytes()).hexdigest()}
                  for entry, value in zip(entries, values)]
        manifest.with_name(f"{manifest.stem}_scores.json").write_text(json.dumps(
            {"manifest": manifest.name, "metrics": {metric: {"label": metric, "version": "1", "mean": 0.0}}, "images": images}))
        return manifest

    return score


def make(output, *manifests, **flags):
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    pairs.main(["--manifests", *map(str, manifests), "--output", str(output), *words])
    return [row for path in sorted(output.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_a_folder_that_training_reads_with_where_it_comes_from(scored, tmp_path, capsys):
    base, tuned = scored("base", [0, 5, 1, 5]), scored("tuned", [2, 5, 3, 5], seed=1)
    [row] = make(tmp_path / "out", base, tuned)
    told = capsys.readouterr().out
    assert "1 of 2 prompts gave a pair, 1 pairs in all; their gaps in PickScore" in told
    side = 0 if row["label_0"] == 1 else 1
    assert row["caption"] == "a red cat" and row["gap"] == 3
    assert [row[f"{name}_{side}"] for name in ("model", "seed", "pickscore")] == ["tuned", 1, 3.0]
    assert [row[f"{name}_{1 - side}"] for name in ("model", "seed", "pickscore")] == ["base", 0, 0.0]
    stem = tuned.stem
    assert row[f"jpg_{side}"] == (tuned.parent / stem / "2_64x64.png").read_bytes()
    data = DataOptions(train_data_dir=str(tmp_path / "out"))
    chosen = choose_pairs(load_table(data), data, seed=0)
    assert chosen.first_wins.tolist() == [side == 0] and "Pick-a-Pic" in chosen.layout

    rows = make(tmp_path / "out", base, tuned, rule="all")  # the same images paired anew
    assert len(rows) == 6 and {row["caption"] for row in rows} == {"a red cat"}
    record = json.loads((tmp_path / "out" / "pairs.json").read_text())
    assert (record["rule"], record["pairs"], record["prompts"], record["prompts_with_a_pair"]) == ("all", 6, 2, 1)
    assert len(make(tmp_path / "out", base, tuned, rule="margin", min_gap=2)) == 3


def test_what_cannot_be_paired_is_one_line(scored, make_manifest, tmp_path):
    base = scored("base", [0, 5, 1, 5])

    def refused(match, *manifests, output="out", **flags):
        with pytest.raises(UserError, match=match):
            make(tmp_path / output, *manifests, **flags)

    refused("has no scores: python -m eval.score", make_manifest("unscored", ["x"]))
    refused("no score by clip", base, metrics="clip")
    refused("say how far", base, rule="margin")
    refused("take --rule margin", base, rule="all", min_gap=1)
    refused("no prompt gave a pair", base, min_gap=9)
    refused("names 1 models for 2 manifests", base, base, models="x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    refused("holds something that is no earlier result", base, output="mine")
    image = base.parent / base.stem / "0_64x64.png"
    image.write_bytes(image.read_bytes() + b"0")
    refused("as it is now has no score", base)
    image.unlink()
    refused("cannot be read", base)
    assert not (tmp_path / "out").exists()


def test_models_whose_folders_end_alike_are_told_apart(scored, tmp_path):
    manifests = [scored(f"{run}/eval", [value] * 4, seed=seed) for seed, (run, value) in enumerate((("one", 1), ("two", 2)))]
    row = make(tmp_path / "pairs", *manifests)[0]
    assert {row["model_0"], row["model_1"]} == {str(manifest.parent) for manifest in manifests}
