import io

import datasets
import pytest
from PIL import Image

from shapes.mixture import held_out
from shapes.drawing import parse
from shapes.oracle import judge
from shapes.preferences import BASE_NAME, LABEL_NOISE, write_preferences
from common.errors import UserError


@pytest.mark.slow
def test_half_are_the_bases_own_and_mostly_ranked_as_the_oracle_ranks(tmp_path):
    folder = write_preferences(tmp_path / "pairs", 48, seed=3, num_inference_steps=8)
    rows = datasets.load_dataset("parquet", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 48 and not any(held_out(parse(text)) for text in rows["caption"])
    agreements = {True: [], False: []}
    for row in rows:
        scores = [judge(Image.open(io.BytesIO(row[column])), row["caption"]).score for column in ("jpg_0", "jpg_1")]
        agreements[row["model_0"] == BASE_NAME].append((scores[0] > scores[1]) == (row["label_0"] == 1))
    assert len(agreements[True]) == 24
    assert sum(agreements[True]) / 24 == pytest.approx(1 - LABEL_NOISE, abs=0.2)
    assert sum(agreements[False]) / 24 > 0.95  # a clean drawing against a flawed one


def test_one_pair_is_refused(tmp_path):
    with pytest.raises(UserError, match="at least two"):
        write_preferences(tmp_path, 1)
