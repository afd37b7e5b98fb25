"""Every fault of a pair that the docs name: used, replaced by its neighbour, or dropped."""

import json
import time

import numpy as np
import pytest

from common.errors import UserError
from common.images import BadImage, decode_image, image_bytes
from tests.faults import REPLACED, encoded, image_faults, picture, write_faulty_pairs
from tests.runs import equal, weights

JPEG = encoded(picture(), "JPEG")
FAULTS = image_faults(JPEG)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faulty")
    planted = write_faulty_pairs(folder, num_good=41)
    return folder / "faulty", {row for row, outcome in planted.values() if outcome == REPLACED}


@pytest.mark.parametrize("name", FAULTS)
def test_an_image_is_used_or_refused_as_the_docs_say(name):
    cell, outcome = FAULTS[name]
    begin = time.perf_counter()
    if outcome == REPLACED:
        with pytest.raises(BadImage):
            decode_image(image_bytes(cell))
        assert time.perf_counter() - begin < 0.5  # the bomb is refused by its header: decoding it takes seconds
    else:
        image = decode_image(image_bytes(cell))
        assert image.mode == "RGB" and image.size == (64, 64)


def test_conversions_keep_what_a_viewer_shows():
    sixteen = np.asarray(decode_image(FAULTS["16 bit"][0])).astype(int)
    assert abs(sixteen.mean() - 127.5) < 1  # Pillow's own conversion makes such an image white
    animated = np.asarray(decode_image(FAULTS["animated WebP"][0])).astype(int)
    assert np.abs(animated - np.asarray(picture()).astype(int)).mean() < 8  # the first frame
    transparent = picture("RGBA")
    transparent.putalpha(0)
    assert (np.asarray(decode_image(encoded(transparent, "PNG"))) == 255).all()  # over white


def test_a_path_cell_reads_regular_files_only(tmp_path):
    (tmp_path / "image.jpg").write_bytes(JPEG)
    assert image_bytes({"bytes": None, "path": str(tmp_path / "image.jpg")}) == JPEG
    for path in ("/dev/zero", str(tmp_path), str(tmp_path / "missing.jpg"), "nul\0byte"):
        with pytest.raises(BadImage):
            image_bytes({"bytes": None, "path": path})


@pytest.mark.slow
def test_check_data_counts_what_was_planted(faulty, program, tmp_path):
    folder, replaced = faulty
    report = tmp_path / "report.jsonl"
    told = program("data.check", [folder, "--num_workers", "2", "--report", report], expect=1)
    assert {json.loads(line)["row"] for line in report.read_text().splitlines()} == replaced
    assert f"Cannot be used, their neighbours take their place: {len(replaced)} of 66" in told
    assert "1 of 69 pairs dropped without a decision" in told and "2 pairs dropped without a label" in told
    for remark in ("duplicate of an earlier pair (row 49)", "CMYK image", "2 x empty caption", "2 x animated image"):
        assert remark in told
    assert told.index("Cannot be used") < told.index("duplicate of an earlier pair") < told.index("CMYK image")
    assert "Captions' length was not checked" in told and "\nerror: 18.18% of the pairs cannot be used" in told


def flags(base, folder, output, *more) -> list:
    return ["--pretrained_model_name_or_path", base, "--train_data_dir", folder, "--resolution", 64, "--mixed_precision", "no",
            "--output_dir", output, *more]


@pytest.mark.slow
def test_training_on_every_fault_ends_and_counts_agree(faulty, train_run, train_tiny, tiny_sd15, tmp_path):
    """With one process, with data workers, and with two processes that share the batch."""
    folder, replaced = faulty

    def events(name):
        lines = (tmp_path / name / "bad_data.jsonl").read_text().splitlines()
        return sorted(map(tuple, (json.loads(line).items() for line in lines)))

    epoch = ["--max_train_steps", 11, "--max_bad_fraction", 1, "--train_batch_size", 6, "--seed", 1]
    logs = train_run(flags(tiny_sd15, folder, tmp_path / "one", *epoch))
    assert logs[-1]["bad_pairs"] > 0 and all(np.isfinite(step["train_loss"]) for step in logs)
    train_run(flags(tiny_sd15, folder, tmp_path / "workers", *epoch, "--dataloader_num_workers", 2))
    train_tiny(tmp_path / "two", "--max_train_steps=11", "--max_bad_fraction=1", "--train_batch_size=3", pairs=folder, processes=2)

    replacements = f"{logs[-1]['bad_pairs']:.0f} pairs could not be used and were replaced"
    assert replacements in (tmp_path / "one" / "train.log").read_text()
    found = events("one")
    assert {dict(event)["row"] for event in found} == replaced
    assert found == events("workers") == events("two")
    assert all(dict(event)["replaced_by"] not in replaced for event in found)
    assert equal(weights(tmp_path / "one"), weights(tmp_path / "workers"))


def test_too_many_bad_pairs_stop_the_run_with_a_checkpoint(faulty, train_run, tiny_sd15, tmp_path):
    folder, _ = faulty
    with pytest.raises(UserError, match="could not be used, more than --max_bad_fraction 0.01") as error:
        train_run(flags(tiny_sd15, folder, tmp_path, "--max_train_steps", 40))
    assert "\n" not in str(error.value) and f"error: {error.value}\n" in (tmp_path / "train.log").read_text()
    [stopped] = tmp_path.glob("checkpoint-*")
    assert (stopped / "unet.pth").is_file() and not (tmp_path / "unet.pth").exists()
    # Raising the bound lets the same command go on: it is no setting that changes what is learned.
    step = int(stopped.name.split("-")[1])
    assert len(train_run(flags(tiny_sd15, folder, tmp_path, "--max_train_steps", step + 2, "--max_bad_fraction", 1))) == 2
