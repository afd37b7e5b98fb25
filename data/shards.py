"""The first parquet files of a large dataset on the hub, instead of all of them."""

import os
import re

import datasets
from huggingface_hub import HfApi, hf_hub_download

from common.errors import UserError
from common.train_options import DataOptions

OTHER_SPLITS = ("test", "validation", "valid", "val", "dev", "eval")


def load_first_shards(data: DataOptions, cache_dir: str | None = None) -> datasets.Dataset:
    """The rows of the split's first --dataset_shards parquet files, nothing else being downloaded; the table's
    info.description says what part of the whole they are. Raises UserError."""
    files = split_files(HfApi().list_repo_tree(data.source, repo_type="dataset", recursive=True), data)
    if not files:
        raise UserError(f"{data.source} lists no parquet file of the split '{data.split}' on the hub: drop --dataset_shards")
    first = files[:data.dataset_shards]
    kept_in = cache_dir and os.path.join(cache_dir, "hub")
    local = [hf_hub_download(data.source, file.path, repo_type="dataset", cache_dir=kept_in) for file in first]
    table = datasets.load_dataset("parquet", data_files={data.split: local}, split=data.split, cache_dir=cache_dir)
    part, whole = sum(file.size for file in first), sum(file.size for file in files)
    table.info.description = (f"the first {len(first)} of {len(files)} files, {size(part)} of {size(whole)} "
                              f"({part / max(whole, 1):.1%})")
    return table


def split_files(listing, data: DataOptions) -> list:
    """The listed parquet files of the split (and of --dataset_config_name, a folder), by name."""
    folder = f"/{data.dataset_config_name}/" if data.dataset_config_name else "/"
    parquet = sorted((file for file in listing if file.path.endswith(".parquet") and folder in f"/{file.path}"),
                     key=lambda file: file.path)
    of_split = [file for file in parquet if _names(file.path, data.split)]
    if not of_split and data.split == "train":  # files that name no split are the training split's
        return [file for file in parquet if not any(_names(file.path, split) for split in OTHER_SPLITS)]
    return of_split


def _names(path: str, split: str) -> bool:
    return re.search(rf"(^|[/_.-]){re.escape(split)}([/_.-]|$)", path) is not None


def size(count: int) -> str:
    """"3.2 GB", "41 MB", "5 KB"."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count / 1e3:.3g} KB"
