"""python -m data.check: planted contradictions, cut captions, sizes and duplicates are counted exactly."""

import io
import random

import datasets
import numpy as np
from PIL import Image

from common.train_checks import parse_options
from common.train_options import ModelOptions
from data.choosing import choose_pairs
from data.contradictions import contradictions
from data.look import balance, look_through, opposed, sizes, truncated
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
    _, pairs = opened(rows, tmp_path)
    assert contradictions(pairs) == [[0, 1, 2, 3], [8, 9]]
    assert "6 pairs show the same two images" in opposed(pairs)[0] and "rows 0 and 1 and 2 and 3; 8 and 9" in opposed(pairs)[0]


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
    rows = [("a", encoded(picture), encoded(picture, compress_level=0), 1.0), ("b", image(2), encoded(clear), 1.0)]
    data, pairs = opened(rows, tmp_path)
    twice, flat = (report.remarks for report in look_through(pairs, data, 0))
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
    for words in ("9 rows, 9 to train on", "Labels: image 0 wins", "none is enlarged for --resolution 64",
                  "2 pairs show the same two images under one caption with opposite winners (rows 3 and 8)", "all of them fit",
                  "Cannot be used, their neighbours take their place: 0 of 9"):
        assert words in told, told
