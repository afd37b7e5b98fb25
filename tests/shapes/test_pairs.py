import io

import datasets
import pytest
from PIL import Image

from shapes.drawing import parse
from shapes.pairs import write_pairs
from common.errors import UserError


def test_pairs_open_with_datasets_in_pick_a_pics_columns(tmp_path):
    folder = write_pairs(tmp_path / "pairs", 120, seed=1)
    rows = datasets.load_dataset("parquet", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.num_rows == 120
    assert set(rows.column_names) == {"caption", "jpg_0", "jpg_1", "label_0", "model_0", "model_1"}
    assert set(rows["label_0"]) == {0.0, 0.5, 1.0}
    assert rows["label_0"][:].count(0.5) < 30
    dream = [("dream" in row["model_0"]) + ("dream" in row["model_1"]) for row in rows]
    assert {0, 1, 2} == set(dream)
    for row in rows:
        parse(row["caption"])
        for column in ("jpg_0", "jpg_1"):
            image = Image.open(io.BytesIO(row[column]))
            assert image.format == "JPEG" and image.size == (64, 64)


def test_the_seed_decides_every_byte(tmp_path):
    first, again, other = (next(write_pairs(tmp_path / name, 8, seed=seed).glob("*.parquet")).read_bytes()
                           for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert first == again != other


def test_no_pairs_is_refused(tmp_path):
    with pytest.raises(UserError, match="at least one"):
        write_pairs(tmp_path, 0)


def test_the_program(tmp_path, program):
    program("shapes.pairs", ["--output", tmp_path / "out", "--num_pairs", 3, "--seed", 5])
    assert list((tmp_path / "out").glob("*.parquet"))
