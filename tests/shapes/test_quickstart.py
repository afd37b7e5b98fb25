"""The quickstart's own program: the table and the picture of what a run left. The commands are scripts/quickstart.sh."""

import json
import random

import pyarrow.parquet as pq
import pytest
from PIL import Image

from common.errors import UserError
from eval.metrics import METRICS, load_metric, read_config
from shapes.drawing import Flaws, parse, render, wrong_colour
from shapes.oracle import judge
from shapes.quickstart import MODELS, PARTS, SHOWN, prepare, summarise

PROMPTS = [f"a red {kind} on a {colour} background" for colour in ("blue", "white", "yellow") for kind in
           ("circle", "square", "triangle", "cross")]


@pytest.fixture
def finished(tmp_path):
    for number, model in enumerate(MODELS):
        folder = tmp_path / "eval" / model
        (folder / "images").mkdir(parents=True)
        for place, prompt in enumerate(PROMPTS):
            render(parse(prompt), 32).save(folder / "images" / f"{place}.png")
        (folder / "shapes_cfg.json").write_text(json.dumps(
            [{"prompt": prompt, "gen_image_path": f"images/{place}.png"} for place, prompt in enumerate(PROMPTS)]))
        (folder / "shapes_cfg_scores.json").write_text(json.dumps({"metrics": {part: {"mean": 0.8 + number / 100} for part in PARTS}}))
        (tmp_path / model).mkdir()
        lines = [{"step": step, "implicit_acc_accumulated": 0.9, "avg_win_diff_loss": 0.02 * number, "avg_lose_diff_loss": 0.04,
                  "ref_mse_unaccumulated": 0.1} for step in range(1, 31)]
        (tmp_path / model / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return tmp_path


def test_the_table_and_the_picture(finished, capsys):
    summarise(finished)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows[0] == ["model", "pairs ranked right", "winner's error", "loser's error", *PARTS]
    assert rows[2] == ["base", "-", "-", "-", *["0.800"] * 6] and rows[3][:4] == ["plain", "0.90", "+20%", "+40%"]
    assert rows[4] == ["safeguarded", "0.90", "+40%", "+40%", *["0.820"] * 6]
    picture = Image.open(finished / "samples.png")
    assert picture.height == 3 * (96 + 4) and picture.width == 90 + SHOWN * 100
    assert picture.getpixel((90 + 2, 2)) == (40, 80, 215)  # the first prompt's background


def test_other_pairs_are_made_where_another_number_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shapes.pipeline.base_pipeline", lambda folder: folder)
    for asked in (4, 4, 6):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
        prepare(tmp_path, asked)
        [file] = tmp_path.rglob("*.parquet")
        assert pq.read_metadata(file).num_rows == asked and f"{asked} preference pairs" in capsys.readouterr().out
    assert before and before[file] != file.stat().st_mtime_ns


def test_what_is_missing_is_one_line(finished):
    next((finished / "eval" / "plain").glob("*_scores.json")).unlink()
    with pytest.raises(UserError, match="eval/plain holds no scored images: bash scripts/quickstart.sh"):
        summarise(finished)


def test_the_oracles_parts_are_metrics():
    config = read_config("shapes/metrics.yaml")
    try:
        drawing = parse(PROMPTS[0])
        images = [render(drawing, 32), render(drawing, 32, Flaws(blur=0.8)), render(wrong_colour(drawing, random.Random(0)), 32)]
        for part in PARTS[1:]:
            found = load_metric(part, config=config).score(images, [PROMPTS[0]] * 3).tolist()
            assert found == pytest.approx([float(getattr(judge(image, PROMPTS[0]), part)) for image in images]), part
            assert METRICS[part].label == part.capitalize()
        assert found[0] > found[1]
    finally:
        for part in PARTS[1:]:
            METRICS.pop(part, None)
