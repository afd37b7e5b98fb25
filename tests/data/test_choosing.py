"""Which rows are trained on, and who wins."""

import datasets
import numpy as np
import pytest

from common.errors import UserError
from data.choosing import choose_pairs
from data.table import content_digest, load_table
from tests.data.tables import jpeg, options, table


@pytest.mark.parametrize("labels, columns, flags, words", [
    ([1.0, 0.3], {}, [], ["label_0 must be 0, 0.5 or 1", "row 1", "0.3"]),
    ([0.5, 0.5], {}, [], ["no usable pair is left of 2"]),
    ([1.0], {"jpg_1": None}, [], ["lacks the column jpg_1"]),
    ([1.0], {"caption": None}, [], ["lacks the column caption"]),
    ([1.0], {}, ["--caption_column", "text"], ["lacks the column text"]),
    ([1.0], {}, ["--dreamlike_pairs_only"], ["lacks the columns model_0, model_1"]),
    ([1.0], {"model_0": ["sdxl"], "model_1": ["dreamlike"]}, ["--dreamlike_pairs_only"], ["no usable pair", "Dreamlike"]),
    ([1.0], {}, ["--split", "validation"], ["validation"]),
])
def test_a_faulty_dataset_is_one_line(labels, columns, flags, words, tmp_path):
    data = options(table(labels, tmp_path, **columns), *flags)
    if "--split" in flags:  # a single parquet file is whatever split is asked for; a folder is not
        data.train_data_dir = str(tmp_path)
    with pytest.raises(UserError) as error:
        choose_pairs(load_table(data), data, seed=0)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_changed_rows_have_another_digest_and_patterns_in_a_path_are_told(tmp_path):
    def digest(**columns):
        path = table([1, 0], tmp_path, **columns)
        data = options(path)
        return content_digest(load_table(data), data), choose_pairs(load_table(data), data, 0).digest()

    first, again = digest(), digest()
    assert first == again
    assert all(a != b for a, b in zip(first, digest(caption=["caption 1", "caption 0"])))
    assert first[0] != digest(jpg_0=[jpeg("red"), jpeg("blue") + b"0"])[0]
    folder = tmp_path / "pairs [v2]"
    folder.mkdir()
    with pytest.raises(UserError, match="reads as a pattern"):
        load_table(options(table([1, 0], folder)))


def test_only_pairs_of_two_dreamlike_models(tmp_path):
    path = table([1.0, 1.0, 0.0], tmp_path, model_0=["Dreamlike-2", "sdxl", "my-dream"],
                 model_1=["dreamlike-photoreal", "dream", "dreamlike"])
    data = options(path, "--dreamlike_pairs_only")
    assert choose_pairs(load_table(data), data, seed=0).index.tolist() == [0, 2]


def test_max_train_samples_is_a_seeded_shuffles_head(tmp_path):
    path = table([1.0] * 50, tmp_path)
    data = options(path, "--max_train_samples", "20")
    once, again, other = (choose_pairs(load_table(data), data, seed=seed).index.tolist() for seed in (1, 1, 2))
    assert once == again != other and len(set(once)) == 20
    data.max_train_samples = 10
    assert choose_pairs(load_table(data), data, seed=1).index.tolist() == once[:10]


def test_ai_feedback_labels_replace_the_datasets(tmp_path):
    data = options(table([1.0, 0.5, 0.0], tmp_path))
    pairs = choose_pairs(load_table(data), data, seed=0, labels=np.array([0.0, 1.0, 0.5], dtype=object))
    assert pairs.index.tolist() == [0, 1] and pairs.first_wins.tolist() == [False, True]


def test_the_same_table_from_parquet_folder_and_saved_dataset(tmp_path):
    path = table([1.0, 0.0], tmp_path)
    datasets.Dataset.from_parquet(str(path)).save_to_disk(tmp_path / "saved")
    for source in (path, tmp_path / "saved"):
        data = options(source)
        assert len(choose_pairs(load_table(data), data, 0)) == 2


def test_a_split_of_a_table_that_has_none_is_refused(tmp_path):
    path = table([1.0, 0.0], tmp_path)
    datasets.Dataset.from_parquet(str(path)).save_to_disk(tmp_path / "saved")
    for source in (path, tmp_path / "saved"):
        with pytest.raises(UserError, match="one table without splits: drop --split test"):
            load_table(options(source, "--split", "test"))


def test_sft_takes_a_dataset_without_pairs_and_undecided_winners_are_dropped(tmp_path):
    path = tmp_path / "single.parquet"
    datasets.Dataset.from_dict({"text": ["a", "b"], "picture": [jpeg("red"), jpeg("blue")]}).to_parquet(path)
    pairs = choose_pairs(load_table(data := options(path, "--sft", "--image_column", "picture", "--caption_column", "text")), data,
                         0, method="sft")
    assert pairs.image_columns == ["picture"] and pairs.index.tolist() == [0, 1]
    data = options(table([0.5, 0.0], tmp_path))
    assert choose_pairs(load_table(data), data, 0, method="sft").index.tolist() == [1]
