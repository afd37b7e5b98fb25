"""Reading a cache that data.cache made, and refusing one that this run would not have made itself."""

import json
import os
import zlib
from functools import lru_cache
from pathlib import Path

import datasets
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import UserError, first_line
from common.files import digest
from common.train_options import DataOptions
from data.bad_pairs import BadPair
from data.images import CUT
from models.family import Family
from models.identity import encoder_identities

SETTINGS, MANIFEST, PROMPTS, ROWS = "settings.json", "manifest.json", "prompts.json", "rows"
FORMAT = 3


# --- what a cache is made of ---------------------------------------------------------------------------------------

def cache_settings(data: DataOptions, family: Family, mixed_precision: str, image_columns: list[str]) -> dict:
    """Everything that a cached number depends on, but for the rows."""
    return {
        "format": FORMAT,
        "data": source_name(data), "dataset_config_name": data.dataset_config_name, "split": data.split,
        "caption_column": data.caption_column,
        "image_columns": image_columns,
        "model": family.options.pretrained_model_name_or_path, "family": family.name, "encoders": encoder_identities(family),
        "mixed_precision": mixed_precision, "sequence_length": family.sequence_length, "resolution": data.resolution,
        "transform": CUT, "flips": not data.no_hflip,
    }


def source_name(data: DataOptions) -> str | None:
    """The data's name: a hub id, or an absolute path where it is a local one."""
    return os.path.abspath(data.source) if data.train_data_dir or data.is_local else data.source


def check_settings(folder: Path, cached: dict, run: dict, rows_are_known: bool) -> None:
    """Refuse a cache that this run would not have made itself. Raises UserError naming every difference.

    rows_are_known: the data's name says nothing more, its rows were compared.
    """
    harmless = {"model"}  # a name; the digests beside it say whether the models are the same
    if run["data"] is None or rows_are_known:  # a run that names no data takes the cache's
        harmless |= {"data", "dataset_config_name"}
    if cached.get("flips") and not run["flips"]:  # a run without flips uses half of a cache that has both
        harmless.add("flips")
    differences = [f"{name} was {_short(cached.get(name))}, is {_short(run[name])}" for name in run
                   if name not in harmless and cached.get(name) != run[name]]
    if differences:
        hint = "" if "data" in harmless else ", name no data and take the cache's rows"
        raise UserError(f"--cached_dataset {folder} was made otherwise than this run asks for ({'; '.join(differences)}; "
                        f"made with {cached.get('model')}): train with those{hint}, or cache into another folder")


def with_checks(tensors: dict[str, Tensor], dims: int) -> dict[str, Tensor]:
    """The tensors, and of each as NAME.checks the CRC-32 of its entries along the first `dims` dimensions, int64: so that
    a reader knows whether an entry is what was written."""
    checks = {name: torch.tensor([check_sum(entry) for entry in tensor.flatten(0, dims - 1)], dtype=torch.int64)
              .reshape(tensor.shape[:dims]) for name, tensor in tensors.items()}
    return tensors | {f"{name}.checks": sums for name, sums in checks.items()}


def check_sum(entry: Tensor) -> int:
    return zlib.crc32(entry.contiguous().flatten().view(torch.uint8).numpy())


def _short(value) -> str:
    """A setting in a message; of a digest, enough to tell it from another."""
    if isinstance(value, dict):
        return " ".join(f"{name} {str(each)[:19]}" for name, each in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def read_json(path: Path, missing: str) -> dict | list:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(missing) from None
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, first_line(error)) from None


def damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged ({reason}): cache again, into an empty folder")


def incomplete(path: Path, why: str = "", delete: str = "it") -> UserError:
    """Of a file that data.cache makes again where it is missing."""
    return UserError(f"{path} is missing or damaged{why}: delete {delete} and run data.cache again, it makes what is "
                     "missing")


def read_settings(folder: Path, missing: str) -> dict:
    settings = read_json(folder / SETTINGS, missing)
    if not isinstance(settings, dict):
        raise damaged(folder / SETTINGS, "not what was written")
    return settings


# --- reading, when training ----------------------------------------------------------------------------------------

@lru_cache(maxsize=256)
def _open_shard(path: str, process: int):
    """An opened shard, memory-mapped; `process` keeps handles from being shared across a fork."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise incomplete(Path(path), f" ({first_line(error)})") from None


class CachedDataset:
    """The encoded rows and prompts of a finished cache. Raises UserError where it is missing, unfinished or damaged."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.settings = read_settings(self.folder, f"--cached_dataset {folder}: no cache is there; make one with "
                                      "python -m data.cache and the same flags")
        manifest = read_json(self.folder / MANIFEST, f"--cached_dataset {folder} is not finished: run data.cache "
                             "with the same flags again, it continues")
        try:
            shards, files = dict(manifest["shards"]), dict(manifest["files"])
            self.faults = {int(row): dict(reasons) for row, reasons in manifest["faults"].items()}
            self.pairs_per_shard, self.prompts_per_shard = manifest["pairs_per_shard"], manifest["prompts_per_shard"]
            whole = min(self.pairs_per_shard, self.prompts_per_shard) > 0
        except (KeyError, TypeError, ValueError, AttributeError):
            whole = False
        if not whole:
            raise damaged(self.folder / MANIFEST, "not what was written")
        for name, size in shards.items():
            if not (self.folder / name).is_file() or (self.folder / name).stat().st_size != size:
                raise incomplete(self.folder / name)
        for name, known in files.items():
            if not (self.folder / name).is_file() or digest(self.folder / name) != known:
                raise incomplete(self.folder / name, delete=f"{MANIFEST} beside it")
        prompts = read_json(self.folder / PROMPTS, f"{self.folder / PROMPTS} is missing: cache again")
        self.prompt_numbers = {prompt: number for number, prompt in enumerate(prompts)}

    def rows(self) -> datasets.Dataset:
        """The table without its images."""
        try:
            return datasets.load_from_disk(str(self.folder / ROWS))
        except (OSError, ValueError) as error:
            raise incomplete(self.folder / ROWS, f" ({first_line(error, 150)})", f"{MANIFEST} beside it") from None

    def check_images(self, row: int, columns: list[str]) -> None:
        """Raises BadPair where decoding these columns would."""
        faults = self.faults.get(row, {})
        for column in ("row", *columns, ", ".join(sorted(columns))):
            if column in faults:
                raise BadPair(column, faults[column])

    def moments(self, row: int, images: list[int], flipped: list[bool]) -> Tensor:
        """The VAE's mean and log-variance of the given images of a row, each flipped or not: (k, 2C, h, w)."""
        shard, number = divmod(row, self.pairs_per_shard)
        path = self.folder / f"pairs-{shard:05}.safetensors"
        file = _open_shard(str(path), os.getpid())
        stored, checks = file.get_slice("moments"), file.get_slice("moments.checks")
        return torch.stack([_checked(stored[number, image, int(flip)], checks[number, image, int(flip)], path)
                            for image, flip in zip(images, flipped)])

    def prompt(self, prompt: str) -> dict[str, Tensor]:
        """The text of one prompt, as the family encodes it, without its first dimension."""
        shard, number = divmod(self.prompt_numbers[prompt], self.prompts_per_shard)
        path = self.folder / f"prompts-{shard:05}.safetensors"
        file = _open_shard(str(path), os.getpid())
        return {name: _checked(file.get_slice(name)[number], file.get_slice(f"{name}.checks")[number], path)
                for name in file.keys() if not name.endswith(".checks")}


def _checked(entry: Tensor, known: Tensor, path: Path) -> Tensor:
    if check_sum(entry) != int(known):
        raise incomplete(path)
    return entry


def check_cache(cache: CachedDataset, data: DataOptions, family: Family, mixed_precision: str,
                image_columns: list[str]) -> None:
    """Compare what this run would encode, and by which encoders, with the cache. Raises UserError."""
    run = cache_settings(data, family, mixed_precision, image_columns)
    check_settings(cache.folder, cache.settings, run, rows_are_known=data.is_local)
