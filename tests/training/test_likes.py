"""KTO on single images, each liked or disliked, without pairs."""

import json

import datasets
import pytest

from common.errors import UserError
from training.records import read_metrics

W = 1.6


@pytest.fixture(scope="module")
def likes_dir(tmp_path_factory, pairs_dir):
    """The images of the pairs one by one, every winner liked."""
    rows = [row for row in datasets.Dataset.from_parquet(str(next(pairs_dir.glob("*.parquet")))).select(range(16))
            if row["label_0"] != 0.5]
    folder = tmp_path_factory.mktemp("likes")
    datasets.Dataset.from_dict({
        "caption": [row["caption"] for row in rows for _ in "ab"],
        "image": [row[column] for row in rows for column in ("jpg_0", "jpg_1")],
        "label": [(row["label_0"] == 1) == (column == 0) for row in rows for column in (0, 1)],
    }).to_parquet(folder / "train.parquet")
    return folder


def flags(base, source, *more):
    return ["--pretrained_model_name_or_path", base, "--train_data_dir", source, "--resolution", 64, "--mixed_precision", "no",
            "--train_method", "kto", "--proportion_empty_prompts", 0, *more]


def test_single_images_are_trained_on_with_a_time_and_a_noise_each(tiny_sd15, likes_dir, train_run, capsys):
    first, *rest = train_run(flags(tiny_sd15, likes_dir, "--train_batch_size", 8, "--beta_dpo", 500))
    share = first["liked_share"]
    assert 0 < share < 1 and first["train_loss"] == pytest.approx(0.5 * (W * share + (2 - W) * (1 - share)), abs=1e-6)
    assert first["margin_mean"] == 0 and rest[-1]["margin_std"] > 0 and first["pairs_seen"] == 8
    told = capsys.readouterr().out
    assert "single images in image, liked by label" in told and "images are liked" in told


def test_two_processes_share_the_reference_point_and_take_the_step_of_one(tiny_sd15, likes_dir, tmp_path, train):
    losses = {}
    for processes, batch in ((1, 4), (2, 2)):
        output = tmp_path / str(processes)
        train(flags(tiny_sd15, likes_dir, "--train_batch_size", batch, "--beta_dpo", 500, "--optimizer", "sgd", "--learning_rate",
                    1e-2, "--lr_warmup_steps", 0, "--max_train_steps", 3, "--seed", 4, "--checkpointing_steps", 0, "--report_to",
                    "none", "--output_dir", output), processes)
        losses[processes] = [step["train_loss"] for step in read_metrics(output / "metrics.jsonl")]
    assert losses[1][-1] != losses[1][0] and losses[1] == pytest.approx(losses[2], rel=1e-4)


@pytest.mark.parametrize("more, words", [
    (["--use_winner_preserving"], ["--use_winner_preserving needs pairs", "single images"]),
    (["--winner_error_weight", 0.1], ["--winner_error_weight needs pairs"]),
    (["--train_method", "ipo"], ["no known layout of preference pairs"]),
    (["--label_column", "likes"], ["lacks the column likes"]),
])
def test_what_needs_pairs_is_refused_in_one_line(more, words, tiny_sd15, likes_dir, train_run):
    with pytest.raises(UserError) as error:
        train_run(flags(tiny_sd15, likes_dir, *more))
    assert all(word in str(error.value) for word in words), error.value


def test_a_label_that_is_neither_is_refused_with_its_row(tiny_sd15, likes_dir, train_run, tmp_path):
    listing = tmp_path / "likes.jsonl"
    listing.write_text("".join(json.dumps({"caption": "x", "image": "a.png", "label": label}) + "\n" for label in (1, 0, 0.5)))
    with pytest.raises(UserError, match="row 2 has 0.5 in label, which must be true or false"):
        train_run(flags(tiny_sd15, listing))
