"""Reading a cache that training.cache made, and refusing one that this run would not have made itself."""

import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path

import datasets
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from training.arguments import TrainArguments
from training.bad_data import BadPair
from training.errors import UserError, first_line
from training.models import Models, load_frozen_encoders

SETTINGS, MANIFEST, PROMPTS, ROWS = "settings.json", "manifest.json", "prompts.json", "rows"
FORMAT = 1


# --- what a cache is made of ---------------------------------------------------------------------------------------

def weights_digest(module: torch.nn.Module) -> str:
    """SHA-256 of a module's weights, wherever it was loaded from; names are left out, they change with the library."""
    sha = hashlib.sha256()
    for tensor in module.state_dict().values():
        sha.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def source_name(args: TrainArguments) -> str | None:
    """The data's name: a hub id, or an absolute path where it is a local one."""
    source = args.data_source
    return os.path.abspath(source) if args.train_data_dir or source and os.path.exists(source) else source


def cache_settings(args: TrainArguments, models: Models) -> dict:
    """Everything that a cached number depends on."""
    tokenizers = [json.dumps([tokenizer.get_vocab(), tokenizer.pad_token, tokenizer.model_max_length], sort_keys=True)
                  for tokenizer in models.tokenizers]
    return {
        "format": FORMAT,
        "data": source_name(args), "dataset_config_name": args.dataset_config_name, "split": args.split,
        "caption_column": args.caption_column,
        "model": args.pretrained_model_name_or_path, "vae": weights_digest(models.vae),
        "text_encoders": [weights_digest(encoder) for encoder in models.text_encoders],
        "tokenizers": [hashlib.sha256(text.encode()).hexdigest() for text in tokenizers],
        "sdxl": args.sdxl, "mixed_precision": args.mixed_precision, "resolution": args.resolution,
        "transform": "short side bilinear, centre crop, [-1, 1]", "flips": not args.no_hflip,
        "latent_channels": models.vae.config.latent_channels, "scaling_factor": models.vae.config.scaling_factor,
    }


def check_settings(folder: Path, cached: dict, run: dict) -> None:
    """Refuse a cache that this run would not have made itself. Raises UserError naming every difference."""
    harmless = {"model"}  # a name; the digests beside it say whether the models are the same
    if run["data"] is None:  # the run names no data: it takes the cache's
        harmless |= {"data", "dataset_config_name"}
    if cached.get("flips") and not run["flips"]:  # a run without flips uses half of a cache that has both
        harmless.add("flips")
    differences = [f"{name} was {_short(cached.get(name))}, is {_short(run[name])}" for name in run
                   if name not in harmless and cached.get(name) != run[name]]
    if differences:
        raise UserError(f"--cached_dataset {folder} was made otherwise than this run asks for "
                        f"({'; '.join(differences)}; made with {cached.get('model')}): train with those, or cache into another folder")


def _short(value) -> str:
    values = value if isinstance(value, list) else [value]
    words = [v[:12] if isinstance(v, str) and len(v) == 64 else str(v) for v in values]
    return " ".join(words)


def read_json(path: Path, missing: str) -> dict | list:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(missing) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}): cache again, into an empty folder") from None


# --- reading, when training ----------------------------------------------------------------------------------------

@lru_cache(maxsize=256)
def _open_shard(path: str, process: int):
    """An opened shard, memory-mapped; `process` keeps handles from being shared across a fork."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is missing or damaged ({first_line(error)}): delete it and run training.cache "
                        "again, it makes what is missing") from None


class CachedDataset:
    """The encoded rows and prompts of a finished cache. Raises UserError where it is missing, unfinished or damaged."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.settings = read_json(self.folder / SETTINGS, f"--cached_dataset {folder}: no cache is there; make one "
                                  "with python -m training.cache and the same flags")
        manifest = read_json(self.folder / MANIFEST, f"--cached_dataset {folder} is not finished: run training.cache "
                             "with the same flags again, it continues")
        for name, size in manifest["shards"].items():
            if not (self.folder / name).is_file() or (self.folder / name).stat().st_size != size:
                raise UserError(f"{self.folder / name} is missing or damaged: delete it and run training.cache again, "
                                "it makes what is missing")
        self.faults = {int(row): reason for row, reason in manifest["faults"].items()}
        self.pairs_per_shard, self.prompts_per_shard = manifest["pairs_per_shard"], manifest["prompts_per_shard"]
        prompts = read_json(self.folder / PROMPTS, f"{self.folder / PROMPTS} is missing: cache again")
        self.prompt_numbers = {prompt: number for number, prompt in enumerate(prompts)}

    def rows(self) -> datasets.Dataset:
        """The table without its images."""
        try:
            return datasets.load_from_disk(str(self.folder / ROWS))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder / ROWS} is missing or damaged ({first_line(error)[:150]}): delete "
                            f"{MANIFEST} beside it and run training.cache again") from None

    def check_images(self, row: int, columns: list[str]) -> None:
        """Raises BadPair where decoding these columns would."""
        faults = self.faults.get(row, {})
        for column in ("row", *columns, ", ".join(sorted(columns))):
            if column in faults:
                raise BadPair(column, faults[column])

    def moments(self, row: int, images: list[int], flipped: list[bool]) -> Tensor:
        """The VAE's mean and log-variance of the given images of a row, each flipped or not: (k, 2C, h, w)."""
        shard, number = divmod(row, self.pairs_per_shard)
        file = _open_shard(str(self.folder / f"pairs-{shard:05}.safetensors"), os.getpid())
        stored = file.get_slice("moments")
        return torch.stack([stored[number, image, int(flip)] for image, flip in zip(images, flipped)])

    def prompt(self, prompt: str) -> dict[str, Tensor]:
        """{"embeddings": (77, D)} and, for SDXL, {"pooled": (P,)}."""
        shard, number = divmod(self.prompt_numbers[prompt], self.prompts_per_shard)
        file = _open_shard(str(self.folder / f"prompts-{shard:05}.safetensors"), os.getpid())
        return {name: file.get_slice(name)[number] for name in file.keys()}


def check_cache(cache: CachedDataset, models: Models, args: TrainArguments, dtype: torch.dtype) -> None:
    """Compare the run's encoders with those of the cache; they are on the host and for this moment only. UserError."""
    load_frozen_encoders(models, args, dtype, torch.device("cpu"))
    check_settings(cache.folder, cache.settings, cache_settings(args, models))
    models.vae, models.text_encoders = None, []
