"""Votes to preference pairs, and two training steps on them."""

import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from common.errors import UserError
from common.files import digest, write_json
from data import votes as program
from eval import judge
from shapes.drawing import caption, random_drawing, random_flaws, render
from tests.votes import prefer, write_votes

HOSTILE = "../../etc <script>alert(1)</script>"


@pytest.fixture
def page(tmp_path) -> Path:
    """A page of six pairs: drawings by "good", flawed ones by "bad", the first with a hostile prompt."""
    rng, manifests = random.Random(0), []
    drawings = [random_drawing(rng) for _ in range(6)]
    for model in ("good", "bad"):
        folder = tmp_path / model
        folder.mkdir()
        for k, drawing in enumerate(drawings):
            flaws = random_flaws(rng, "ragged", 0.8) if model == "bad" else None
            (render(drawing, 64, flaws) if flaws else render(drawing, 64)).save(folder / f"{k}.png")
        manifests.append(folder / "shapes.json")
        write_json(manifests[-1], [{"prompt": HOSTILE if k == 0 else f"{k} {caption(drawing)}", "gen_image_path": f"{k}.png"}
                                   for k, drawing in enumerate(drawings)])
    judge.main(["--manifests", *manifests, "--output", tmp_path / "page.html"])
    return tmp_path / "page.html"


def write(tmp_path, *votes, flags=()) -> list[dict]:
    program.main([*map(str, votes), "--output", tmp_path / "pairs", *flags])
    return pq.read_table(tmp_path / "pairs" / "train-00000.parquet").to_pylist()


def test_votes_to_pairs_to_two_training_steps(page, tmp_path, tiny_sd15, train_run, capsys):
    good, bad = prefer("good", "bad"), prefer("bad", "good")

    def ben(left, right, prompt):
        return {"1": "tie", "2": "bad", "3": bad(left, right, prompt)}.get(prompt[0]) or good(left, right, prompt)

    rows = write(tmp_path, write_votes(page, tmp_path / "anna.json", good, "anna"),
                 write_votes(page, tmp_path / "ben.json", ben, "ben"))
    assert "6 pairs by 2 judges, 5 decided, 1 tie that" in capsys.readouterr().out
    assert {row["caption"] for row in rows} >= {HOSTILE} and len(rows) == 6
    for row in rows:
        side = 0 if row["model_0"] == "good" else 1
        assert {row["model_0"], row["model_1"]} == {"good", "bad"} and row["judges"] == ["Anna", "Ben"]
        for place in (0, 1):
            assert Path(row[f"path_{place}"]).read_bytes() == row[f"jpg_{place}"]
        counted = [row[f"votes_{side}"], row[f"votes_{1 - side}"], row["votes_tie"], row["votes_bad"]]
        expected = {"1": [1, 0, 1, 0], "2": [1, 0, 0, 1], "3": [1, 1, 0, 0]}.get(row["caption"][0], [2, 0, 0, 0])
        assert counted == expected and row["label_0"] == (0.5 if row["caption"][0] == "3" else 1.0 - side)
    logs = train_run(["--pretrained_model_name_or_path", tiny_sd15, "--train_data_dir", tmp_path / "pairs", "--resolution", 64,
                      "--max_train_steps", 2, "--train_batch_size", 2, "--mixed_precision", "no"])
    assert len(logs) == 2
    assert "1 of 6 pairs dropped without a decision" in capsys.readouterr().out


def test_more_votes_replace_the_pairs_and_others_are_left_alone(page, tmp_path):
    votes = write_votes(page, tmp_path / "v.json", prefer("good", "bad"), limit=2)
    assert len(write(tmp_path, votes)) == 2
    assert len(write(tmp_path, write_votes(page, tmp_path / "v.json", prefer("good", "bad")))) == 6
    (tmp_path / "pairs" / "train-00000.parquet").rename(tmp_path / "pairs" / "own.parquet")
    with pytest.raises(UserError, match=r"holds other pairs \(own.parquet\)"):
        write(tmp_path, votes)


def test_images_gone_or_changed_are_one_line(page, tmp_path, capsys):
    votes = write_votes(page, tmp_path / "v.json", prefer("good", "bad"))
    image = tmp_path / "good" / "1.png"
    image.write_bytes((tmp_path / "good" / "2.png").read_bytes())
    with pytest.raises(UserError, match=r"1 of 6 pairs have .*good/1.png has changed since it was judged"):
        write(tmp_path, votes)
    image.unlink()
    with pytest.raises(UserError, match="1 of 6 pairs have .*1.png.*--skip_missing"):
        write(tmp_path, votes)
    assert not (tmp_path / "pairs").exists()
    rows = write(tmp_path, votes, flags=["--skip_missing"])
    assert len(rows) == 5 and "1 of 6 pairs have an image that is gone or changed: left out" in capsys.readouterr().err
    for path in (tmp_path / "bad").glob("*.png"):
        path.unlink()
    with pytest.raises(UserError, match="no pair is left"):
        write(tmp_path, votes, flags=["--skip_missing"])


def test_the_page_does_not_touch_what_it_shows(page, tmp_path):
    before = {path: digest(path) for path in tmp_path.rglob("*.png")}
    write(tmp_path, write_votes(page, tmp_path / "v.json", prefer("bad", "good")))
    assert before == {path: digest(path) for path in tmp_path.rglob("*.png")}
