import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from common.train_options import parse_arguments
from data.pairs import PairDataset, choose_pairs, content_digest, load_table
from common.errors import UserError
from data.images import to_pixels


def jpeg(colour, size=(64, 64)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def table(labels, folder, **columns):
    rows = {"caption": [f"caption {n}" for n in range(len(labels))], "jpg_0": [jpeg("red")] * len(labels),
            "jpg_1": [jpeg("blue")] * len(labels), "label_0": labels, **columns}
    rows = {name: values for name, values in rows.items() if values is not None}
    path = folder / "pairs.parquet"
    datasets.Dataset.from_dict(rows).to_parquet(path)
    return path


def arguments(path, *flags):
    return parse_arguments(["--pretrained_model_name_or_path", "m", "--train_data_dir", str(path), "--resolution", "64",
                            "--lr_warmup_steps", "0", *flags])


class OneToken:
    """A tokenizer that keeps the caption readable."""
    model_max_length = 77

    def __call__(self, captions, **_):
        return type("Ids", (), {"input_ids": torch.tensor([[len(caption)] for caption in captions])})


def test_labels_name_the_winner_and_undecided_pairs_are_dropped_aloud(tmp_path):
    args = arguments(table([1.0, 0.0, 0.5, 1.0], tmp_path), "--no_hflip")
    pairs = choose_pairs(load_table(args), args, seed=0)
    assert pairs.index.tolist() == [0, 1, 3] and pairs.first_wins.tolist() == [True, False, True]
    assert "1 of 4 pairs dropped without a decision" in pairs.notes[0]
    dataset = PairDataset(pairs, [OneToken()], args, 0, (4, 8, 8))
    for index, red_wins in enumerate(pairs.first_wins):
        winner, loser = dataset[0, index]["pixel_values"].float() / 255
        red, blue = (winner, loser) if red_wins else (loser, winner)
        assert red[0].mean() > 0.9 > red[2].mean() and blue[2].mean() > 0.9


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
    args = arguments(table(labels, tmp_path, **columns), *flags)
    if "--split" in flags:  # a single parquet file is whatever split is asked for; a folder is not
        args.train_data_dir = str(tmp_path)
    with pytest.raises(UserError) as error:
        choose_pairs(load_table(args), args, seed=0)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_changed_rows_have_another_digest_and_patterns_in_a_path_are_told(tmp_path):
    def digest(**columns):
        path = table([1, 0], tmp_path, **columns)
        args = arguments(path)
        return content_digest(load_table(args), args), choose_pairs(load_table(args), args, 0).digest()

    first, again = digest(), digest()
    assert first == again
    assert all(a != b for a, b in zip(first, digest(caption=["caption 1", "caption 0"])))
    assert first[0] != digest(jpg_0=[jpeg("red"), jpeg("blue") + b"0"])[0]
    folder = tmp_path / "pairs [v2]"
    folder.mkdir()
    with pytest.raises(UserError, match="reads as a pattern"):
        load_table(arguments(table([1, 0], folder)))


def test_only_pairs_of_two_dreamlike_models(tmp_path):
    path = table([1.0, 1.0, 0.0], tmp_path, model_0=["Dreamlike-2", "sdxl", "my-dream"],
                 model_1=["dreamlike-photoreal", "dream", "dreamlike"])
    args = arguments(path, "--dreamlike_pairs_only")
    assert choose_pairs(load_table(args), args, seed=0).index.tolist() == [0, 2]


def test_max_train_samples_is_a_seeded_shuffles_head(tmp_path):
    path = table([1.0] * 50, tmp_path)
    args = arguments(path, "--max_train_samples", "20")
    once, again, other = (choose_pairs(load_table(args), args, seed=seed).index.tolist() for seed in (1, 1, 2))
    assert once == again != other and len(set(once)) == 20
    args.max_train_samples = 10
    assert choose_pairs(load_table(args), args, seed=1).index.tolist() == once[:10]


def test_ai_feedback_labels_replace_the_datasets(tmp_path):
    args = arguments(table([1.0, 0.5, 0.0], tmp_path))
    pairs = choose_pairs(load_table(args), args, seed=0, labels=np.array([0.0, 1.0, 0.5], dtype=object))
    assert pairs.index.tolist() == [0, 1] and pairs.first_wins.tolist() == [False, True]


def test_the_same_table_from_parquet_folder_and_saved_dataset(tmp_path):
    path = table([1.0, 0.0], tmp_path)
    datasets.Dataset.from_parquet(str(path)).save_to_disk(tmp_path / "saved")
    for source in (path, tmp_path / "saved"):
        args = arguments(source)
        assert len(choose_pairs(load_table(args), args, 0)) == 2


def test_a_split_of_a_table_that_has_none_is_refused(tmp_path):
    path = table([1.0, 0.0], tmp_path)
    datasets.Dataset.from_parquet(str(path)).save_to_disk(tmp_path / "saved")
    for source in (path, tmp_path / "saved"):
        with pytest.raises(UserError, match="one table without splits: drop --split test"):
            load_table(arguments(source, "--split", "test"))


def test_prompts_are_dropped_once_a_pair_at_the_asked_rate(tmp_path):
    args = arguments(table([1.0], tmp_path), "--proportion_empty_prompts", "0.3")
    dataset = PairDataset(choose_pairs(load_table(args), args, 0), [OneToken()], args, 0, (4, 8, 8))
    empty = sum(dataset[position, 0]["input_ids.0"].item() == 0 for position in range(400))
    assert 80 < empty < 160


def stripes(width, height):
    """Left half black, right half white."""
    image = Image.new("RGB", (width, height))
    image.paste((255, 255, 255), (width // 2, 0, width, height))
    return image


def test_pixels_are_resized_cropped_flipped_and_scaled():
    pixels = to_pixels(stripes(128, 64), 64)
    assert pixels.shape == (3, 64, 64) and pixels.min() == -1 and pixels.max() == 1
    assert (pixels[:, :, 0] == -1).all() and (pixels[:, :, -1] == 1).all(), "the centre is kept"
    assert (to_pixels(stripes(128, 64), 64, crop=torch.tensor([0.0, 0.0])) == -1).all(), "the left end"
    assert (to_pixels(stripes(128, 64), 64, crop=torch.tensor([0.0, 0.999])) == 1).all(), "the right end"
    assert torch.equal(to_pixels(stripes(128, 64), 64, flip=True), pixels.flip(2))
    assert to_pixels(stripes(640, 1000), 64).shape == (3, 64, 64)


def test_flips_are_independent_or_paired(tmp_path):
    def flips(*flags):
        args = arguments(path, *flags)
        dataset = PairDataset(choose_pairs(load_table(args), args, 0), [OneToken()], args, 0, (4, 8, 8))
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
    args = arguments(table([1.0], tmp_path), "--input_perturbation", "0.5", "--noise_offset", "0.1")
    item = PairDataset(choose_pairs(load_table(args), args, 0), [OneToken()], args, 0, (4, 8, 8))[3, 0]
    assert item["noise"].shape == item["input_noise"].shape == (4, 8, 8)
    extra = item["input_noise"] - item["noise"]
    assert 0.4 < extra.std() < 0.6


def test_sft_takes_a_dataset_without_pairs(tmp_path):
    path = tmp_path / "single.parquet"
    datasets.Dataset.from_dict({"text": ["a"], "picture": [jpeg("red")]}).to_parquet(path)
    args = arguments(path, "--sft", "--image_column", "picture", "--caption_column", "text")
    dataset = PairDataset(choose_pairs(load_table(args), args, 0), [OneToken()], args, 0, (4, 8, 8))
    assert dataset[0, 0]["pixel_values"].shape == (1, 3, 64, 64)
