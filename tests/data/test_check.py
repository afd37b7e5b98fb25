"""python -m data.check: planted contradictions, cut captions, sizes and duplicates are counted exactly."""

import io
import random
from contextlib import nullcontext

import datasets
import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from common.train_checks import parse_options
from common.train_options import ModelOptions
from data.choosing import choose_pairs
from data.contradictions import contradictions
from data.bad_pairs import allowed_bad_pairs
from data.look import PairReport, balance, look_through, marked, opposed, sizes, stop_where_training_would, truncated
from data.sheet import spread, write_sheet
from data.table import load_table
from models.family import open_family


def image(number: int, side: int = 64, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def opened(rows: list[tuple], folder) -> tuple:
    """rows: caption, image 0, image 1, label -> the options' data group and its pairs."""
    path = folder / "pairs.parquet"
    columns = dict(zip(("caption", "jpg_0", "jpg_1", "label_0"), zip(*rows)))
    datasets.Dataset.from_dict({name: list(values) for name, values in columns.items()}).to_parquet(path)
    data = parse_options(["--pretrained_model_name_or_path=x", f"--train_data_dir={path}"]).data
    return data, choose_pairs(load_table(data), data, 0)


def test_contradictions_are_found_by_content_in_any_order(tmp_path):
    a, b, c, d = map(image, range(4))
    rows = [("cat", a, b, 1.0),
            ("cat", a, b, 0.0),   # relabelled
            ("cat", b, a, 1.0),   # swapped, and the other wins
            ("cat", b, a, 0.0),   # swapped, the same wins: agrees with row 0
            ("dog", a, b, 0.0),   # another caption
            ("cat", a, c, 0.0),   # another image
            ("owl", c, d, 1.0), ("owl", c, d, 1.0),  # a duplicate, no contradiction
            ("fox", c, d, 1.0), ("fox", d, c, 1.0)]
    data, pairs = opened(rows, tmp_path)
    assert contradictions(pairs) == [[0, 1, 2, 3], [8, 9]]
    line, = opposed(contradictions(pairs))
    assert "6 pairs show the same two images" in line and "rows 0 and 1 and 2 and 3; 8 and 9" in line
    assert marked(look_through(pairs, data, 0), contradictions(pairs)) == (
        dict.fromkeys([0, 1, 2, 3, 8, 9], "contradiction") | {7: "duplicate"})


def test_images_of_equal_length_are_told_apart(tmp_path):
    """Uncompressed images of one size have as many bytes: only their content tells them apart."""
    a, b, c = (image(number, kind="BMP") for number in range(3))
    _, pairs = opened([("cat", a, b, 1.0), ("cat", a, c, 0.0), ("cat", b, c, 0.0)], tmp_path)
    assert contradictions(pairs) == []


def test_training_starts_with_a_warning_of_contradictions(tmp_path, tiny_sd15, train_run, capsys):
    rows = [(f"caption {number}", image(number), image(number + 100), 1.0) for number in range(6)]
    rows.append(("caption 2", image(2), image(102), 0.0))
    opened(rows, tmp_path)
    train_run([f"--pretrained_model_name_or_path={tiny_sd15}", f"--train_data_dir={tmp_path / 'pairs.parquet'}", "--resolution=64",
               "--mixed_precision=no", "--max_train_steps=1"])
    assert "2 pairs contradict each other" in (error := capsys.readouterr().err) and "rows 2 and 6" in error


def test_sizes_balance_and_duplicates_are_counted(tmp_path):
    rows = [("a", image(0, 64), image(1, 64), 1.0), ("b", image(2, 32), image(3, 128), 1.0), ("c", image(4, 64), image(5, 64), 0.0),
            ("a", image(0, 64), image(1, 64), 1.0)]
    data, pairs = opened(rows, tmp_path)
    reports = look_through(pairs, data, 0)
    assert sizes(reports, 64)[0].startswith("Images: short sides 32 to 128 pixels, median 64; most are 64x64 (6)")
    assert "1 of 8 are enlarged for --resolution 64" in sizes(reports, 64)[0]
    assert "none is enlarged" in sizes(reports, 32)[0]
    assert balance(pairs) == ["Labels: image 0 wins 3 of 4 pairs (75.0%)"]
    assert [report.row for report in reports if "duplicate of an earlier pair" in report.remarks] == [3]


def test_images_that_teach_nothing_are_remarked_on(tmp_path):
    def encoded(picture: Image.Image, **settings) -> bytes:
        picture.save(file := io.BytesIO(), "PNG", **settings)
        return file.getvalue()

    picture = Image.open(io.BytesIO(image(0)))
    clear = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    palette = picture.quantize(16)
    rows = [("a", encoded(picture), encoded(picture, compress_level=0), 1.0), ("b", image(2), encoded(clear), 1.0),
            ("c", encoded(palette, transparency=3), encoded(palette), 1.0), ("d", image(3), encoded(picture, transparency=(1, 2, 3)), 1.0)]
    data, pairs = opened(rows, tmp_path)
    reports = look_through(pairs, data, 0)
    twice, flat, palettes, colour = (report.remarks for report in reports)
    assert marked(reports, []) == {0: "same picture", 1: "flat colour"}
    assert palettes == ["P image, converted to RGB, over white where transparent", "P image, converted to RGB"]
    assert colour == ["RGB image, converted to RGB, over white where transparent"]
    assert [remark[:22] for remark in twice] == ["the same picture twice"]
    assert flat == ["RGBA image, converted to RGB, over white where transparent", "an image is one flat colour"]


def test_captions_that_are_cut_are_counted_with_the_share_that_is_lost(tmp_path, tiny_sd15):
    """One token a word: 75 of 100 and of 150 words are read."""
    words = ["cat " * 75, "cat " * 100, "cat " * 150]
    data, pairs = opened([(text, image(n), image(n + 9), 1.0) for n, text in enumerate(words)], tmp_path)
    line, = truncated(look_through(pairs, data, 0), open_family(ModelOptions(str(tiny_sd15))))
    assert line.startswith("Captions: 2 of 3 are longer than SD1.5's text encoder reads (rows 1, 2)")
    assert f"{100 / 250:.1%} of their tokens are lost" in line


def test_the_program_reports_all_of_it(tmp_path, tiny_sd15, program):
    rows = [(f"caption {number}", image(number), image(number + 100), float(random.Random(number).random() < 0.5)) for number in range(8)]
    rows.append((rows[3][0], rows[3][2], rows[3][1], rows[3][3]))
    opened(rows, tmp_path)
    told = program("data.check", [tmp_path / "pairs.parquet", "--pretrained_model_name_or_path", tiny_sd15, "--num_workers", 0])
    assert told.index("Contradictions") < told.index("all of them fit")
    for words in ("9 rows, 9 to train on", "Labels: image 0 wins", "none is enlarged for --resolution 64",
                  "2 pairs show the same two images under one caption with opposite winners (rows 3 and 8)", "all of them fit",
                  "Cannot be used, their neighbours take their place: 0 of 9"):
        assert words in told, told


def faults(*bad: int, of: int) -> list[PairReport]:
    return [PairReport(row, fault=("chosen", "empty image") if row in bad else None) for row in range(of)]


def test_the_check_stops_where_a_pass_over_the_data_would(capsys):
    stop_where_training_would(faults(0, of=154), 0.01)
    assert not capsys.readouterr().err
    stop_where_training_would(faults(0, 50, 100, of=154), 0.01)
    assert "warning: 1.95% of the pairs cannot be used, more than --max_bad_fraction 0.01, but not clearly" in capsys.readouterr().err
    allowed = int(allowed_bad_pairs(154, 0.01))
    stop_where_training_would(faults(*range(0, 2 * allowed, 2), of=154), 0.01)
    with pytest.raises(UserError, match="3.90% of the pairs cannot be used, clearly more than --max_bad_fraction 0.01"):
        stop_where_training_would(faults(*range(0, 2 * allowed + 2, 2), of=154), 0.01)


@pytest.mark.parametrize("bad, of, told", [(range(10, 109), 20_000, None), (range(10, 110), 20_000, "100 pairs in a row .* row 10 on"),
                                           ([*range(60), *range(19_950, 20_000)], 20_000, "110 pairs .* row 19950 on"),
                                           (range(3), 3, "3 pairs in a row .* row 0 on"), (range(2), 3, None)])
def test_too_many_bad_pairs_in_a_row_are_told_whatever_the_bound(bad, of, told):
    with pytest.raises(UserError, match=told) if told else nullcontext():
        stop_where_training_would(faults(*bad, of=of), 1.0)


def test_captions_without_a_base_are_said_to_be_unchecked():
    line, = truncated([], None)
    assert line == "Captions' length was not checked: name the base with --pretrained_model_name_or_path"


def test_a_sheet_shows_marked_pairs_first_and_up_to_a_third_of_them(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("data.sheet.draw_pair", lambda pairs, index, mark: drawn.append((index, mark)) or Image.new("RGB", (4, 4)))
    assert write_sheet(range(100), tmp_path / "a.png", 9, {5: "duplicate", 6: "flat colour", 7: "duplicate", 8: "x"}) == 9
    assert drawn[:3] == [(5, "duplicate"), (6, "flat colour"), (7, "duplicate")] and len({index for index, _ in drawn}) == 9
    assert drawn[3][0] == 0 and drawn[-1][0] > 80 and spread([], 3) == []
