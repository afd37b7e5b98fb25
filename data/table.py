"""The table of preference pairs: loading it, and choosing which rows are trained on and who wins."""

import glob
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.compute

from common.errors import UserError, first_line
from common.train_options import DataOptions
from data.files import LISTINGS, has_pair_folders, read_listing, read_pair_folders
from data.layouts import decide, find_layout


def load_table(data: DataOptions, cache_dir: str | None = None) -> datasets.Dataset:
    """The split named by the options, images still encoded. Raises UserError when it cannot be had."""
    source = data.source
    path = Path(source)
    if path.exists() and glob.escape(source) != source:
        raise UserError(f"the path {source} holds one of * ? [, which datasets reads as a pattern: rename it")
    try:
        if path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            table = datasets.load_from_disk(source)
            if isinstance(table, datasets.DatasetDict):
                table = table[data.split]
            else:
                check_only_split(data)
        elif path.is_dir() and has_pair_folders(path):
            check_only_split(data)
            table = read_pair_folders(path)
        elif path.is_file() and path.suffix.lower() in LISTINGS:
            check_only_split(data)
            table = read_listing(path)
        elif path.is_file():
            check_only_split(data)
            table = datasets.load_dataset("parquet", data_files={data.split: source}, split=data.split,
                                          cache_dir=cache_dir)
        elif data.train_data_dir and not path.is_dir():
            raise UserError(f"--train_data_dir {source}: no such folder or file")
        elif data.dataset_shards:
            from data.shards import load_first_shards
            table = load_first_shards(data, cache_dir)
        else:
            table = datasets.load_dataset(source, data.dataset_config_name, split=data.split, cache_dir=cache_dir)
    except UserError:
        raise
    except KeyError:
        raise UserError(f"{source} has no split '{data.split}': choose one with --split") from None
    except Exception as error:  # datasets and its readers raise many kinds; each is a fault of the named dataset
        raise UserError(f"cannot load the dataset {source}: no such folder here, or the hub does not give it or cannot "
                        f"be reached ({type(error).__name__}: {first_line(error)[:200]})") from None
    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    return table


def check_only_split(data: DataOptions) -> None:
    if data.split != "train":
        raise UserError(f"{data.source} holds one table without splits: drop --split {data.split}")


def column_values(table: datasets.Dataset, name: str) -> np.ndarray:
    """A whole column without reading the others (the images). Bytes that are not UTF-8 become lone surrogates."""
    column = table.select_columns(name).with_format("arrow")[:][name]
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        values = [value if value is None else value.decode("utf-8", "surrogateescape")
                  for value in column.cast("large_binary").to_pylist()]
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def content_digest(table: datasets.Dataset, data: DataOptions) -> str:
    """Identity of the rows without reading an image: captions, labels, and the length of each encoded image."""
    sha, layout = hashlib.sha256(), find_layout(table.column_names, data, labelled=False)
    for name in (layout.caption, *layout.labels):
        for value in column_values(table, name) if name in table.column_names else ():
            sha.update(repr(value).encode("utf-8", "surrogatepass"))
    for name in dict.fromkeys([*layout.images, data.image_column]):
        if name in table.column_names:
            for chunk in _lengths(table, name):
                sha.update(repr(chunk.to_pylist()).encode("utf-8", "surrogatepass"))
    return sha.hexdigest()


def _lengths(table: datasets.Dataset, name: str) -> list[pyarrow.Array]:
    """An image column's encoded lengths, chunk by chunk, without reading an image; of images kept as paths, their files'."""
    chunks = []
    for chunk in table.select_columns(name).with_format("arrow")[:][name].chunks:
        if pyarrow.types.is_struct(chunk.type) and chunk.type.get_field_index("bytes") >= 0:
            if chunk.field("bytes").null_count and chunk.type.get_field_index("path") >= 0:
                chunk = pyarrow.array([len(cell["bytes"]) if cell and cell["bytes"] is not None else _file_size(cell)
                                       for cell in chunk.to_pylist()], pyarrow.int32())
            else:
                chunk = chunk.field("bytes")
        if pyarrow.types.is_binary(chunk.type) or pyarrow.types.is_large_binary(chunk.type):
            chunk = pyarrow.compute.binary_length(chunk)
        chunks.append(chunk)
    return chunks


def _file_size(cell: dict | None) -> int | None:
    try:
        return os.path.getsize(cell["path"]) if cell and cell["path"] else None
    except (OSError, ValueError):
        return None


def encoded_lengths(table: datasets.Dataset, name: str) -> np.ndarray:
    """Bytes of each encoded image of a column, -1 where that is not known: (rows,)."""
    values = [value for chunk in _lengths(table, name) for value in chunk.to_pylist()]
    return np.array([value if isinstance(value, int) else -1 for value in values])


@dataclass
class PairTable:
    """rows: the table. index: (n,) the usable rows. first_wins: (n,) bool, image 0 is the winner; of single images, whether
    it is liked. image_columns: two, or the one of single images (sft, kto). notes: what was dropped, and layout how the
    table was read, for the start-up summary."""

    rows: datasets.Dataset
    index: np.ndarray
    first_wins: np.ndarray
    caption_column: str
    image_columns: list[str]
    notes: list[str]
    layout: str = ""

    def __len__(self) -> int:
        return len(self.index)

    @property
    def paired(self) -> bool:
        return len(self.image_columns) == 2

    def digest(self) -> str:
        """Identity of the choice: which rows of how many, their captions, and who wins."""
        sha = hashlib.sha256(len(self.rows).to_bytes(8, "big") + self.index.tobytes() + self.first_wins.tobytes())
        for caption in column_values(self.rows, self.caption_column):
            sha.update(repr(caption).encode("utf-8", "surrogatepass"))
        return sha.hexdigest()[:16]


def choose_pairs(table: datasets.Dataset, data: DataOptions, seed: int, labels: np.ndarray | None = None,
                 method: str | None = "diffusion-dpo") -> PairTable:
    """Which rows are trained on, and who wins (rules: data/layouts.py; ties are dropped).

    labels: (rows,) of 1, 0 and 0.5, for AI feedback, replace the table's. method: sft and kto (or None, for any) will do
    with single images. Raises UserError for an unknown layout, missing columns, labels that decide nothing, or when
    nothing is left.
    """
    names, notes = table.column_names, []
    source = data.source or f"the cache {data.cached_dataset}"
    layout = find_layout(names, data, method, labelled=labels is None)
    needed = [layout.caption, *layout.images] + (layout.labels if labels is None else [])
    needed += ["model_0", "model_1"] if data.dreamlike_pairs_only else []
    missing = [name for name in needed if name not in names]
    if missing:
        raise UserError(f"{source} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; it has "
                        f"{', '.join(names)}. It is read as {layout}; other columns can be named with --caption_column, "
                        "--winner_column, --loser_column and --label_column")

    keep = np.ones(len(table), dtype=bool)
    first_wins = np.ones(len(table), dtype=bool)
    if labels is not None or layout.labels:
        if labels is None:
            labels = decide(layout, [column_values(table, name) for name in layout.labels], source)
        first_wins, keep, dropped = winners(labels, layout.rule, source)
        if data.choice_model:
            notes.append(f"{len(table)} pairs have their labels by {data.choice_model}")
        notes += dropped
    if data.dataset_shards and table.info.description:
        notes.insert(0, table.info.description)
    if data.dreamlike_pairs_only:
        dream = np.array(["dream" in str(a).lower() and "dream" in str(b).lower()
                          for a, b in zip(column_values(table, "model_0"), column_values(table, "model_1"))], dtype=bool)
        notes.append(f"{int((keep & ~dream).sum())} pairs dropped that are not of two Dreamlike models")
        keep &= dream
    index = np.flatnonzero(keep)
    if data.max_train_samples is not None and data.max_train_samples < len(index):
        index = np.random.default_rng([seed, 2]).permutation(index)[:data.max_train_samples]
        notes.append(f"{len(index)} kept by --max_train_samples")
    if len(index) == 0:
        raise UserError(f"no usable pair is left of {len(table)} in {source}: {'; '.join(notes) or 'it is empty'}")
    return PairTable(table, index, first_wins[index], layout.caption, layout.images, notes, str(layout))


def winners(labels: np.ndarray, rule: str, source: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Labels of 1, 0, 0.5 and None -> whether image 0 wins, which rows decide, (rows,) each, and what is dropped, in words.
    Raises UserError for any other label."""
    if any(isinstance(label, (list, dict, np.ndarray)) for label in labels):
        raise UserError(f"{source}: label_0 must be 0, 0.5 or 1, not a list")
    unlabelled = np.array([label is None or label != label for label in labels], dtype=bool)
    try:
        values = np.array([0.5 if bad else label for label, bad in zip(labels, unlabelled)], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: label_0 must be 0, 0.5 or 1 ({first_line(error)})") from None
    odd = np.flatnonzero(~np.isin(values, (0.0, 0.5, 1.0)))
    if len(odd):
        raise UserError(f"{source}: label_0 must be 0, 0.5 or 1, but row {odd[0]} has {labels[odd[0]]} "
                        f"({len(odd)} such rows); --label_column label_0 takes it for a share of votes")
    keep = values != 0.5
    undecided = int((~keep).sum() - unlabelled.sum())
    notes = []
    if rule == "like":
        notes.append(f"{int((values == 1.0).sum())} of {len(labels)} images are liked")
    else:
        notes.append(f"{undecided} of {len(labels)} pairs dropped without a decision (label_0 = 0.5)" if rule == "label_0"
                     else f"{undecided} of {len(labels)} pairs dropped as ties")
    if unlabelled.any():
        notes.append(f"{int(unlabelled.sum())} {'images' if rule == 'like' else 'pairs'} dropped without a label")
    return values == 1.0, keep, notes
