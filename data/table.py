"""The table of preference pairs: loading it, and what its columns say without reading an image."""

import glob
import hashlib
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.compute

from common.errors import UserError, first_line
from common.train_options import DataOptions
from data.files import LISTINGS, has_pair_folders, listing_in, read_listing, read_pair_folders
from data.layouts import find_layout


def load_table(data: DataOptions, cache_dir: str | None = None) -> datasets.Dataset:
    """The split named by the options, images still encoded. Raises UserError when it cannot be loaded."""
    source = data.source
    if Path(source).exists() and glob.escape(source) != source:
        raise UserError(f"the path {source} holds one of * ? [, which datasets reads as a pattern: rename it")
    try:
        table = _read(Path(source), data, cache_dir)
    except UserError:
        raise
    except KeyError:
        raise UserError(f"{source} has no split '{data.split}': choose one with --split") from None
    except Exception as error:  # datasets and its readers raise many kinds; each is a fault of the named dataset
        raise UserError(f"cannot load the dataset {source}: no such folder here, or the hub does not give it or cannot "
                        f"be reached ({type(error).__name__}: {first_line(error, 200)})") from None
    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    return table


def _read(path: Path, data: DataOptions, cache_dir: str | None) -> datasets.Dataset:
    """What lies at `path`; where nothing does, the hub's dataset of that name."""
    if path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        table = datasets.load_from_disk(str(path))
        if isinstance(table, datasets.DatasetDict):
            return table[data.split]
    elif path.is_dir() and has_pair_folders(path):
        table = read_pair_folders(path)
    elif path.is_dir() and (listing := listing_in(path)):
        table = read_listing(listing)
    elif path.is_file() and path.suffix.lower() in LISTINGS:
        table = read_listing(path)
    elif path.is_file():
        table = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=cache_dir)
    elif data.train_data_dir and not path.is_dir():
        raise UserError(f"--train_data_dir {path}: no such folder or file, check the path")
    elif data.dataset_shards:
        from data.shards import load_first_shards
        return load_first_shards(data, cache_dir)
    else:
        return datasets.load_dataset(data.source, data.dataset_config_name, split=data.split, cache_dir=cache_dir)
    if data.split != "train":
        raise UserError(f"{path} holds one table without splits: drop --split {data.split}")
    return table


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
