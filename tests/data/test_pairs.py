"""A pair as tensors, and what is random about it."""

import io

import datasets
import pytest

from common.errors import UserError
from data.pairs import MAX_PASSED_OVER, PairDataset, make_loader
from data.choosing import choose_pairs
from data.table import load_table
from tests.data.tables import dataset_of, jpeg, lengths, options, stripes, table


def test_labels_name_the_winner_and_undecided_pairs_are_dropped_aloud(tmp_path):
    data = options(table([1.0, 0.0, 0.5, 1.0], tmp_path), "--no_hflip")
    pairs = choose_pairs(load_table(data), data, seed=0)
    assert pairs.index.tolist() == [0, 1, 3] and pairs.first_wins.tolist() == [True, False, True]
    assert "1 of 4 pairs dropped without a decision" in pairs.notes[0]
    dataset = PairDataset(pairs, data, 0, (4, 8, 8), lengths)
    for index, red_wins in enumerate(pairs.first_wins):
        winner, loser = dataset[0, index]["pixel_values"].float() / 255
        red, blue = (winner, loser) if red_wins else (loser, winner)
        assert red[0].mean() > 0.9 > red[2].mean() and blue[2].mean() > 0.9


def test_prompts_are_dropped_once_a_pair_at_the_asked_rate(tmp_path):
    data = options(table([1.0], tmp_path), "--proportion_empty_prompts", "0.3")
    dataset = dataset_of(data)
    empty = sum(dataset[position, 0]["tokens.length"].item() == 0 for position in range(400))
    assert 80 < empty < 160


def test_flips_are_independent_or_paired(tmp_path):
    def flips(*flags):
        data = options(path, *flags)
        dataset = dataset_of(data)
        sides = [[member[0, 32, 0].item() > 127 for member in dataset[position, 0]["pixel_values"]] for position in range(60)]
        return {tuple(side) for side in sides}

    encoded = []
    for side in (64, 128):  # two files: the same one twice would be no pair
        buffer = io.BytesIO()
        stripes(side, side).save(buffer, "PNG")
        encoded.append([buffer.getvalue()])
    path = table([1.0], tmp_path, jpg_0=encoded[0], jpg_1=encoded[1])
    assert flips() == {(a, b) for a in (False, True) for b in (False, True)}
    assert flips("--paired_hflip") == {(False, False), (True, True)}
    assert flips("--no_hflip") == {(False, False)}


def test_input_perturbation_is_shared_by_the_pair_and_leaves_the_target(tmp_path):
    data = options(table([1.0], tmp_path), "--input_perturbation", "0.5", "--noise_offset", "0.1")
    item = dataset_of(data)[3, 0]
    assert item["noise"].shape == item["input_noise"].shape == (4, 8, 8)
    extra = item["input_noise"] - item["noise"]
    assert 0.4 < extra.std() < 0.6


def test_sft_takes_a_dataset_without_pairs(tmp_path):
    path = tmp_path / "single.parquet"
    datasets.Dataset.from_dict({"text": ["a"], "picture": [jpeg("red")]}).to_parquet(path)
    data = options(path, "--sft", "--image_column", "picture", "--caption_column", "text")
    dataset = dataset_of(data, winners_only=True)
    assert dataset[0, 0]["pixel_values"].shape == (1, 3, 64, 64)


def test_a_pair_that_cannot_be_used_is_replaced_by_the_next_and_keeps_its_noise(tmp_path):
    good = dataset_of(options(table([1.0] * 4, tmp_path)))
    bad = dataset_of(options(table([1.0] * 4, tmp_path, jpg_0=[b"no image", jpeg("red"), None, jpeg("red")])))
    item = bad[7, 0]
    assert item["passed_over"] == 1 and (item["noise"] == good[7, 0]["noise"]).all() and good[7, 0]["passed_over"] == 0
    assert [(fault["row"], fault["column"], fault["replaced_by"]) for fault in bad.faults(7, 0, 1)] == [(0, "jpg_0", 1)]
    assert bad[7, 3]["passed_over"] == 0 and bad[7, 2]["passed_over"] == 1


def test_many_bad_pairs_in_a_row_are_told(tmp_path):
    dataset = dataset_of(options(table([1.0] * 3, tmp_path, jpg_0=[b"no image"] * 3)))
    with pytest.raises(UserError, match="3 pairs in a row cannot be used, from row 1 on; the last one's jpg_0: .*data.check"):
        dataset[0, 1]
    assert MAX_PASSED_OVER == 100


def test_a_loader_gives_every_process_its_share_from_any_position_with_any_workers(tmp_path):
    dataset = dataset_of(options(table([1.0] * 8, tmp_path)))

    def positions(rank, world, first, steps, workers=0):
        dataset.data.dataloader_num_workers = workers
        loader = make_loader(dataset, 2, rank, world, first, steps, pin_memory=False)
        return [batch["position"].tolist() for batch in loader]

    assert positions(0, 1, 0, 3) == [[0, 1], [2, 3], [4, 5]] == positions(0, 1, 0, 3, workers=2)
    assert positions(0, 2, 4, 2) == [[4, 5], [8, 9]] and positions(1, 2, 4, 2) == [[6, 7], [10, 11]]
