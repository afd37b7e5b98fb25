"""Every layout of preference data, on real JPEG and PNG files: how it is read, and what is refused in one line."""

import csv
import io
import json
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from common.errors import UserError
from common.train_options import DataOptions
from data.files import read_listing
from data.layouts import find_layout
from data.shards import split_files
from data.choosing import choose_pairs
from data.table import content_digest, load_table

WINS = [True, False, True, True, False, True]  # image 0 of each pair
IMAGE = datasets.Image(decode=False)


def encoded(number: int, kind: str) -> bytes:
    """An image that no other number gives."""
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((64, 64)).save(file, kind)
    return file.getvalue()


PAIRS = [(f"a drawing of {n}", encoded(2 * n, "PNG" if n % 2 else "JPEG"), encoded(2 * n + 1, "JPEG")) for n in range(len(WINS))]
CAPTIONS, FIRST, SECOND = map(list, zip(*PAIRS))
WINNERS = [a if wins else b for wins, a, b in zip(WINS, FIRST, SECOND)]
LOSERS = [b if wins else a for wins, a, b in zip(WINS, FIRST, SECOND)]


def parquet(folder, **columns):
    folder.mkdir(exist_ok=True)
    images = {name: [{"bytes": cell, "path": None} for cell in cells] if isinstance(cells[0], bytes) else cells
              for name, cells in columns.items()}
    features = {name: IMAGE if isinstance(columns[name][0], bytes) else None for name in columns}
    table = datasets.Dataset.from_dict(images)
    for name in columns:
        if features[name]:
            table = table.cast_column(name, IMAGE)
    table.to_parquet(folder / "train-00000.parquet")
    return folder


def write(path, content: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def suffix(content: bytes) -> str:
    return ".jpg" if content[:2] == b"\xff\xd8" else ".png"


def pair_folders(folder, names=("w", "l"), captions_in=None):
    for number, (caption, winner, loser) in enumerate(zip(CAPTIONS, WINNERS, LOSERS)):
        for name, content in zip(names, (winner, loser)):
            write(folder / name / f"{number:03}{suffix(content)}", content)
        write(folder / (captions_in or names[0]) / f"{number:03}.txt", f"{caption}\n".encode())
    return folder


def listed(folder, kind):
    rows = []
    for number, wins in enumerate(WINS):
        paths = []
        for side, content in zip("ab", (FIRST[number], SECOND[number])):
            name = f"images/{number}{side}{suffix(content)}"
            write(folder / name, content)
            paths.append(name)
        rows.append({"prompt": CAPTIONS[number], "image_0": paths[0], "image_1": paths[1],
                     "votes_0": 3 if wins else 1, "votes_1": 1 if wins else 3})
    path = folder / f"pairs.{kind}"
    with open(path, "w", newline="") as file:
        if kind == "csv":
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def shares(column):
    return [0.8 if wins else 0.2 for wins in column]


LAYOUTS = {
    "Pick-a-Pic": lambda f: (parquet(f, caption=CAPTIONS, jpg_0=FIRST, jpg_1=SECOND, label_0=[float(w) for w in WINS]), []),
    "chosen, rejected": lambda f: (parquet(f, prompt=CAPTIONS, chosen=WINNERS, rejected=LOSERS), []),
    "shares": lambda f: (parquet(f, text=CAPTIONS, image_0=FIRST, image_1=SECOND, label_0=shares(WINS)), []),
    "scores": lambda f: (parquet(f, prompt=CAPTIONS, image1=FIRST, image2=SECOND, votes_image1=shares(WINS),
                                 votes_image2=shares([not w for w in WINS])), []),
    "names": lambda f: (parquet(f, caption=CAPTIONS, image_0=FIRST, image_1=SECOND,
                                preference=["image_0" if w else "image_1" for w in WINS]), []),
    "w/, l/": lambda f: (pair_folders(f), []),
    "chosen/, rejected/": lambda f: (pair_folders(f, ("chosen", "rejected"), captions_in="rejected"), []),
    "JSONL": lambda f: (listed(f, "jsonl"), []),
    "CSV": lambda f: (listed(f, "csv"), []),
    "named columns": lambda f: (parquet(f, words=CAPTIONS, good=WINNERS, bad=LOSERS),
                                ["--winner_column", "good", "--loser_column", "bad", "--caption_column", "words"]),
    "named columns and share": lambda f: (parquet(f, caption=CAPTIONS, a=FIRST, b=SECOND, liking=shares(WINS)),
                                          ["--winner_column", "a", "--loser_column", "b", "--label_column", "liking"]),
    "numbers of the preferred image": lambda f: (
        parquet(f, caption=CAPTIONS, image_0=FIRST, image_1=SECOND, preference=[0 if w else 1 for w in WINS]),
        ["--winner_column", "image_1", "--loser_column", "image_0", "--label_column", "preference"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_pairs_give_the_same_first_loss_to_the_bit_whatever_the_layout(name, tmp_path, tiny_sd15, train_run,
                                                                                reference_loss, capsys):
    source, flags = LAYOUTS[name](tmp_path / "pairs" if not name.isupper() else tmp_path)
    capsys.readouterr()
    assert first_loss(train_run, tiny_sd15, source, flags) == reference_loss
    told = capsys.readouterr().out
    line = next(line for line in told.splitlines() if line.startswith("  pairs"))
    assert "6 of" in line and "read as" in line, line


@pytest.fixture(scope="module")
def reference_loss(tmp_path_factory, tiny_sd15, train_run):
    source, flags = LAYOUTS["Pick-a-Pic"](tmp_path_factory.mktemp("reference") / "pairs")
    return first_loss(train_run, tiny_sd15, source, flags)


def first_loss(train_run, base, source, flags):
    [scalars, *_] = train_run(["--pretrained_model_name_or_path", base, "--train_data_dir", source, "--resolution", 64,
                               "--mixed_precision", "no", "--max_train_steps", 1, "--train_batch_size", 6, *flags])
    return scalars["train_loss"], scalars["model_mse_unaccumulated"], scalars["grad_norm"]


# --- rules and refusals ------------------------------------------------------------------------------------------------

def choose(source, method="diffusion-dpo", **options):
    data = DataOptions(train_data_dir=str(source), **options)
    return choose_pairs(load_table(data), data, seed=0, method=method)


def test_ties_and_missing_labels_are_dropped_and_counted(tmp_path):
    source = parquet(tmp_path / "p", caption=CAPTIONS, image_0=FIRST, image_1=SECOND, label_0=[0.51, 0.5, None, 0.0, 1.0, 0.49])
    pairs = choose(source)
    assert pairs.index.tolist() == [0, 3, 4, 5] and pairs.first_wins.tolist() == [True, False, True, False]
    assert pairs.notes == ["1 of 6 pairs dropped as ties", "1 pairs dropped without a label"]
    named = parquet(tmp_path / "n", caption=CAPTIONS, image_0=FIRST, image_1=SECOND,
                    choice=["image_0", "Tie", "image_1", "both", None, "image_1"])
    assert choose(named).index.tolist() == [0, 2, 5]


@pytest.mark.parametrize("columns, flags, words", [
    (["caption", "picture"], {}, ["no known layout", "it has caption, picture", "--winner_column"]),
    (["caption", "jpg_0", "jpg_1", "label_0", "chosen", "rejected"], {}, ["2 ways", "Pick-a-Pic", "chosen / rejected"]),
    (["caption", "image_0", "image_1", "votes_0", "votes_1", "preference"], {}, ["2 ways", "votes_0 and votes_1", "preference"]),
    (["caption", "image_0", "image_1"], {}, ["no known layout"]),
    (["caption", "chosen", "rejected"], {"winner_column": "good", "loser_column": "rejected"}, ["lacks the column good"]),
    (["prompt", "chosen", "rejected"], {"caption_column": "words"}, ["lacks the column words", "it has prompt"]),
])
def test_a_layout_that_fits_none_or_two_is_one_line(columns, flags, words):
    table = datasets.Dataset.from_dict({name: ["x"] for name in columns})
    with pytest.raises(UserError) as error:
        choose_pairs(table, DataOptions(train_data_dir="my_pairs", **flags), 0)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value


@pytest.mark.parametrize("column, cells, words", [
    ("label_0", [0.2, 1.7], ["row 1 has 1.7 in label_0", "share of the votes"]),
    ("preference", [0, 1], ["row 0 has 0 in preference", '"image_0"', "--label_column"]),
    ("winner", ["image_0", "left"], ["row 1 has left"]),
])
def test_a_label_that_says_nothing_is_one_line(column, cells, words):
    table = datasets.Dataset.from_dict({"caption": ["a", "b"], "image_0": [b"", b""], "image_1": [b"", b""], column: cells})
    with pytest.raises(UserError) as error:
        choose_pairs(table, DataOptions(train_data_dir="my_pairs"), 0)
    assert all(word in str(error.value) for word in words), error.value


def test_faulty_folders_are_one_line(tmp_path):
    def refused(*words):
        with pytest.raises(UserError) as error:
            choose(folder)
        assert all(word in str(error.value) for word in words), error.value

    folder = pair_folders(tmp_path / "pairs")
    for number in (2, 4):
        next((folder / "l").glob(f"00{number}.*")).rename(folder / f"{number}.kept")
    refused("w holds 2 images without a partner of the same name in the other folder: 002, 004")
    write(folder / "w" / "001.webp", b"x")
    refused("w holds 1 name with several images: 001")
    (folder / "l").rename(folder / "losers")
    refused("only one of the folders w/ and l/")
    folder = pair_folders(tmp_path / "other")
    (folder / "w" / "003.txt").unlink()
    refused("other holds 1 pair without a caption, a .txt of the same name: 003")
    for text in (folder / "w").glob("*.txt"):
        text.unlink()
    refused("holds 6 pairs without a caption", ": 000, 001, 002, 003, 004 and 1 more")
    pair_folders(folder, ("chosen", "rejected"))
    refused("two ways")


def test_the_unnamed_index_that_pandas_writes_is_left_out(tmp_path):
    path = write(tmp_path / "pandas.csv", b",caption,score\n0,a cat,1\n1,,2\n")
    table = read_listing(path)
    assert table.column_names == ["caption", "score"] and table[:] == {"caption": ["a cat", None], "score": ["1", "2"]}


def test_faulty_listings_are_one_line(tmp_path):
    for name, text, words in [
        ("a.jsonl", '{"caption": "x"}\n{oops', "line 2 is no JSON"), ("b.jsonl", "[1]", "line 1 must hold an object"),
        ("c.csv", "caption,chosen,rejected\nx,y\n", "row 1 has not as many cells"), ("d.csv", "caption,chosen\n", "holds no rows"),
        ("e.jsonl", '{"caption": "x"}\n{"caption": 1}', "values of several kinds"),
    ]:
        path = write(tmp_path / name, text.encode())
        with pytest.raises(UserError, match=words):
            choose(path)


def test_a_spreadsheet_of_semicolons_and_the_folder_that_holds_it(tmp_path):
    source = listed(tmp_path, "csv")
    pairs = choose(source)
    semicolons = write(tmp_path / "images" / "list.csv", source.read_bytes().replace(b",", b";").replace(b"images/", b""))
    source.unlink()
    for place in (semicolons, tmp_path / "images"):
        assert str(choose(place).layout) == str(pairs.layout) and len(choose(place)) == len(pairs)


def test_a_folder_of_two_listings_asks_for_one_of_them(tmp_path):
    source = listed(tmp_path, "jsonl")
    write(tmp_path / "p.jsonl", source.read_bytes())
    with pytest.raises(UserError, match=r"holds 2 listings \(p.jsonl, pairs.jsonl\): name one of them with --train_data_dir"):
        choose(tmp_path)
    assert len(choose(tmp_path / "p.jsonl")) == len(WINS)


def test_a_file_that_changes_its_size_changes_the_identity_of_the_rows(tmp_path):
    source = listed(tmp_path, "jsonl")
    data = DataOptions(train_data_dir=str(source))
    before = content_digest(load_table(data), data)
    assert before == content_digest(load_table(data), data)
    with open(tmp_path / "images" / "0a.jpg", "ab") as file:
        file.write(b"0")
    assert before != content_digest(load_table(data), data)


def test_the_check_says_how_it_read_the_pairs_and_draws_them(tmp_path, monkeypatch, capsys):
    from data import check
    sheet = tmp_path / "sheet.png"
    monkeypatch.setattr("sys.argv", ["check", str(pair_folders(tmp_path / "pairs")), "--sheet", str(sheet), "--num_workers", "0"])
    check.main()
    told = capsys.readouterr().out
    assert "read as winner / loser in chosen / rejected" in told and "6 of the pairs are drawn" in told
    picture = np.asarray(Image.open(sheet))
    winner = np.asarray(Image.open(io.BytesIO(WINNERS[0])).convert("RGB"))
    assert picture.shape[1] > 3 * 2 * 64
    assert (picture[8 + 14:8 + 14 + 192:3, 8:8 + 192:3] == winner).all(), "the winner is on the left"


# --- a part of a dataset on the hub ------------------------------------------------------------------------------------

def test_the_first_shards_of_a_hub_dataset(tmp_path, monkeypatch):
    """The hub's listing and its downloads, stood in for by a folder."""
    source = parquet(tmp_path / "hub", caption=CAPTIONS, jpg_0=FIRST, jpg_1=SECOND, label_0=[float(w) for w in WINS])
    rows = pq.read_table(source / "train-00000.parquet")
    files, asked = {}, []
    for number in range(3):
        path = write(tmp_path / "hub" / f"data/train-0000{number}-of-00003.parquet", b"")
        pq.write_table(rows.slice(2 * number, 2), path)
        files[f"data/{path.name}"] = path
    files["data/test-00000-of-00001.parquet"] = files["README.md"] = path
    listing = [SimpleNamespace(path=name, size=path.stat().st_size) for name, path in reversed(files.items())]
    monkeypatch.setattr("data.shards.HfApi", lambda: SimpleNamespace(list_repo_tree=lambda repo, **_: listing))
    monkeypatch.setattr("data.shards.hf_hub_download", lambda repo, name, **_: asked.append(name) or str(files[name]))
    data = DataOptions(dataset_name="someone/pairs", dataset_shards=2)
    pairs = choose_pairs(load_table(data), data, seed=0)
    assert len(pairs) == 4 and asked == ["data/train-00000-of-00003.parquet", "data/train-00001-of-00003.parquet"]
    assert pairs.notes[0].startswith("the first 2 of 3 files, ") and "KB (6" in pairs.notes[0]
    with pytest.raises(UserError, match="no parquet file of the split 'validation'"):
        load_table(DataOptions(dataset_name="someone/pairs", dataset_shards=2, split="validation"))


def test_files_that_name_no_split_are_the_training_split():
    listing = [SimpleNamespace(path=name) for name in ("b.parquet", "a.parquet", "test.parquet", "x.json")]
    assert [file.path for file in split_files(listing, DataOptions())] == ["a.parquet", "b.parquet"]


def test_a_configuration_of_a_hub_dataset_is_a_folder_of_that_name():
    listing = [SimpleNamespace(path=name) for name in ("v1/train-0.parquet", "data/v1/train-1.parquet", "old_v1/train-2.parquet")]
    found = split_files(listing, DataOptions(dataset_config_name="v1"))
    assert [file.path for file in found] == ["data/v1/train-1.parquet", "v1/train-0.parquet"]


def test_single_images_are_for_sft_and_for_likes():
    names, data = ["image", "prompt", "label"], DataOptions(train_data_dir="singles")
    assert str(find_layout(names, data, "sft")) == "single images in image"
    assert str(find_layout(names, data, "kto")) == "single images in image, liked by label"
    with pytest.raises(UserError, match="no known layout of preference pairs"):
        find_layout(names, data, "ipo")
