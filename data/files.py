"""Preference data in files of images: folders of winners and losers, and listings (JSONL, CSV) of paths."""

import csv
import json
from collections import Counter
from pathlib import Path

import datasets
import pyarrow

from common.errors import UserError, first_line

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".jp2")
FOLDERS = (("w", "l"), ("chosen", "rejected"))
LISTINGS = (".jsonl", ".csv")
NAMED = 5  # stems that an error names
PATHS = datasets.Image(decode=False)


def has_pair_folders(folder: Path) -> bool:
    """Whether a folder holds winners and losers in folders of their own. Raises UserError where half of them is missing."""
    there = [pair for pair in FOLDERS if all((folder / name).is_dir() for name in pair)]
    if len(there) > 1:
        raise UserError(f"{folder} can be read in two ways, as w/ with l/ and as chosen/ with rejected/: keep one in it")
    half = [pair for pair in FOLDERS if any((folder / name).is_dir() for name in pair)]
    if half and not there and not any(folder.rglob("*.parquet")):
        raise UserError(f"{folder} holds only one of the folders {half[0][0]}/ and {half[0][1]}/: pairs need both")
    return bool(there)


def read_pair_folders(folder: Path) -> datasets.Dataset:
    """w/STEM.png and l/STEM.jpg (or chosen/, rejected/), the caption in a STEM.txt of either, or beside the two folders:
    rows of caption, chosen, rejected by stem. Raises UserError, e.g. for stems without a partner or a caption."""
    pair = next(pair for pair in FOLDERS if all((folder / name).is_dir() for name in pair))
    winners, losers = (_images_by_stem(folder / name) for name in pair)
    for name, here, there in ((pair[0], winners, losers), (pair[1], losers, winners)):
        _refuse(folder / name, "image", "without a partner of the same name in the other folder",
                sorted(here.keys() - there.keys()))
    stems = sorted(winners)
    if not stems:
        raise UserError(f"{folder / pair[0]} and {folder / pair[1]} hold no images: put some in, of "
                        "the same names in both")
    texts = {stem: next((path for place in (folder / pair[0], folder / pair[1], folder)
                         if (path := place / f"{stem}.txt").is_file()), None) for stem in stems}
    _refuse(folder, "pair", "without a caption, a .txt of the same name", [stem for stem in stems if not texts[stem]])
    return _table({"caption": [_read_text(texts[stem]) for stem in stems],
                   "chosen": [str(winners[stem]) for stem in stems], "rejected": [str(losers[stem]) for stem in stems]},
                  ["chosen", "rejected"], folder)


def listing_in(folder: Path) -> Path | None:
    """The one listing that a folder of images holds; None where there is none, or where `datasets` has its own reading of
    the folder (metadata files, parquet). Raises UserError where there are several."""
    files = [path for path in folder.iterdir() if path.is_file()]
    if any(path.stem == "metadata" for path in files) or any(folder.rglob("*.parquet")):
        return None
    found = sorted(path for path in files if path.suffix.lower() in LISTINGS)
    if len(found) > 1:
        raise UserError(f"{folder} holds {len(found)} listings ({', '.join(path.name for path in found)}): name one of them "
                        "with --train_data_dir")
    return found[0] if found else None


def read_listing(path: Path) -> datasets.Dataset:
    """A JSONL or CSV file as a table; a column whose first value is an image's path holds images, relative paths counting
    from the file's folder. Raises UserError."""
    rows = _csv_rows(path) if path.suffix.lower() == ".csv" else _jsonl_rows(path)
    if not rows:
        raise UserError(f"{path} holds no rows: write one for each pair")
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
    images = [name for name, cells in columns.items()
              if str(next((cell for cell in cells if cell), "")).lower().endswith(IMAGE_SUFFIXES)]
    folder = path.absolute().parent
    for name in images:
        columns[name] = [str(folder / cell) if isinstance(cell, str) and cell else None for cell in columns[name]]
    return _table(columns, images, path)


def _images_by_stem(folder: Path) -> dict[str, Path]:
    paths = [path.absolute() for path in folder.iterdir()
             if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")]
    counts = Counter(path.stem for path in paths)
    _refuse(folder, "name", "with several images", sorted(stem for stem, count in counts.items() if count > 1))
    return {path.stem: path for path in paths}


def _refuse(folder: Path, noun: str, fault: str, stems: list[str]) -> None:
    """Raises UserError where there are stems of this fault."""
    if stems:
        more = f" and {len(stems) - NAMED} more" if len(stems) > NAMED else ""
        raise UserError(f"{folder} holds {len(stems)} {noun}{'s' * (len(stems) > 1)} {fault}: {', '.join(stems[:NAMED])}{more}")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the caption {path}: {first_line(error)}") from None


def _csv_rows(path: Path) -> list[dict]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            delimiter = next((mark for mark in ",;\t" if mark in header), ",")  # spreadsheets write each of them
            reader = csv.DictReader(file, strict=True, delimiter=delimiter)
            rows = list(reader)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from None
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():  # DictReader's name for cells too many, and its filling for those too few
            raise UserError(f"{path}: row {number} has not as many cells as the header, {', '.join(reader.fieldnames)}: "
                            "put cells that hold a delimiter into quotes")
    return [{name: cell or None for name, cell in row.items() if name} for row in rows]  # pandas' index has no name


def _jsonl_rows(path: Path) -> list[dict]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: line {number} is no JSON ({first_line(error)})") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}: line {number} must hold an object of columns, not a {type(row).__name__}")
            rows.append(row)
    return rows


def _table(columns: dict[str, list], images: list[str], source: Path) -> datasets.Dataset:
    try:
        table = datasets.Dataset.from_dict({name: cells for name, cells in columns.items() if name not in images})
        for name in images:
            cells = [cell and {"bytes": None, "path": cell} for cell in columns[name]]
            table = table.add_column(name, cells, feature=PATHS)
        return table
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, UnicodeEncodeError, TypeError, ValueError) as error:
        raise UserError(f"{source}: a column holds values of several kinds ({first_line(error, 150)}): write all of them as "
                        "numbers, or all as text") from None
