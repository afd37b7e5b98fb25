"""Encode a run's images and prompts once: train.py --cached_dataset DIR then needs neither VAE nor text encoder.

    accelerate launch -m data.cache --config configs/train/sd15_diffusion_dpo.yaml --cached_dataset DIR

takes train.py's own flags, so that what is cached is what that command would train on. All rows of the split are
cached, decided or not: which of them are used, and who wins, is settled when training, from the same columns.

    DIR/settings.json                models (by digest), data, resolution, transform; a cache made otherwise is refused
    DIR/rows/                        the table without its images
    DIR/prompts.json                 the distinct prompts, the empty one first
    DIR/prompts-NNNNN.safetensors    embeddings (n, 77, D); SDXL: pooled (n, P)
    DIR/pairs-NNNNN.safetensors      moments (n, images, flips, 2C, h, w): the VAE's mean and log-variance
    DIR/manifest.json                written last: sizes and digests, and the rows that cannot be used

Every entry of a shard has its CRC-32 beside it, which is compared whenever the entry is read.

Moments and embeddings are kept in the dtype in which the encoders answer, so nothing is rounded: a cached run sees the
numbers that an uncached one computes. Shards appear whole, those that are there are kept, and processes share the rest.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from training.options import TrainArguments, parse_arguments
from data.bad_pairs import BadPair, decode_images, read_row, usable_captions
from data.cached import MANIFEST, PROMPTS, ROWS, SETTINGS, cache_settings, read_settings, with_checks
from training.checkpoints import digest, raise_together, sync, write_whole, writing
from data.pairs import choose_pairs, column_values, content_digest, load_table, tokenize
from models.stable_diffusion import encode_moments, encode_prompts
from common.errors import UserError, run_program
from data.images import cut_square, scale_pixels
from training.run import COMPUTE_DTYPES, start_accelerator
from common.locks import LOCK_FILE, hold, release
from models.policy import Models, load_frozen_encoders, load_tokenizers_and_scheduler

PROMPTS_PER_SHARD = 2048


@dataclass
class CacheArguments:
    pairs_per_shard: int = field(default=1024, metadata={"help": "pairs a file (SD1.5: 0.27 MB a pair, SDXL: 1 MB)"})
    encode_batch_size: int = field(default=8, metadata={"help": "pairs, or prompts, that a device encodes at a time"})


class ImageRows(torch.utils.data.Dataset):
    """Row number -> its images (k, 3, H, W) uint8, not flipped, and which columns cannot be used, as JSON."""

    def __init__(self, table: datasets.Dataset, columns: list[str], resolution: int):
        self.table, self.columns, self.resolution = table.select_columns(columns), columns, resolution

    def __getitem__(self, row: int) -> dict:
        pixels = torch.zeros(len(self.columns), 3, self.resolution, self.resolution, dtype=torch.uint8)
        faults = {}
        try:
            cells = read_row(self.table, row)
            for number, column in enumerate(self.columns):
                try:
                    pixels[number] = cut_square(*decode_images(cells, [column]), self.resolution)
                except BadPair as error:
                    faults[error.column] = error.reason
            if not faults and len(pixels) == 2 and torch.equal(*pixels):
                decode_images(cells, self.columns)  # refuses the same file twice
        except BadPair as error:
            faults[error.column] = error.reason
        return {"row": row, "pixels": pixels, "faults": json.dumps(faults) if faults else ""}


@torch.no_grad()
def encode_views(vae, pixels: Tensor, flips: bool) -> Tensor:
    """uint8 images (B, k, 3, H, W) -> moments (B, k, views, 2C, h, w): as they are and, with `flips`, mirrored."""
    images = scale_pixels(pixels.flatten(0, 1))
    moments = [encode_moments(vae, view) for view in ([images, images.flip(-1)] if flips else [images])]
    return torch.stack(moments, dim=1).unflatten(0, pixels.shape[:2])


def write_shard(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file so that it is there whole or not at all."""
    aside = path.with_name(f".{path.name}.partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside, metadata)
    aside.chmod(0o644)  # safetensors makes it private
    sync(aside)
    aside.replace(path)


def write_prompts(folder: Path, prompts: list[str], models: Models, args: TrainArguments, options: CacheArguments,
                  accelerator: Accelerator) -> list[str]:
    """This process's share of the prompt shards; returns the names of all of them."""
    names = [f"prompts-{number:05}.safetensors" for number in range(-(-len(prompts) // PROMPTS_PER_SHARD))]
    for number in range(accelerator.process_index, len(names), accelerator.num_processes):
        if (folder / names[number]).is_file():
            continue
        parts = []
        shard = prompts[number * PROMPTS_PER_SHARD:(number + 1) * PROMPTS_PER_SHARD]
        for start in range(0, len(shard), options.encode_batch_size):
            captions = shard[start:start + options.encode_batch_size]
            ids = [tokenize(tokenizer, captions).to(accelerator.device) for tokenizer in models.tokenizers]
            embeddings, pooled = encode_prompts(models.text_encoders, ids, args.sdxl)
            part = {"embeddings": embeddings} | ({} if pooled is None else {"pooled": pooled})
            parts.append({name: tensor.cpu() for name, tensor in part.items()})
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        write_shard(folder / names[number], with_checks(tensors, dims=1))
    return names


def write_pairs(folder: Path, table: datasets.Dataset, columns: list[str], models: Models, args: TrainArguments,
                options: CacheArguments, accelerator: Accelerator) -> list[str]:
    """This process's share of the image shards; returns the names of all of them."""
    per_shard, rows = options.pairs_per_shard, len(table)
    names = [f"pairs-{number:05}.safetensors" for number in range(-(-rows // per_shard))]
    mine = [number for number in range(accelerator.process_index, len(names), accelerator.num_processes)
            if not (folder / names[number]).is_file()]
    batches = [list(range(start, min(start + options.encode_batch_size, (number + 1) * per_shard, rows)))
               for number in mine
               for start in range(number * per_shard, min((number + 1) * per_shard, rows), options.encode_batch_size)]
    dataset = ImageRows(table, columns, args.resolution)
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=args.dataloader_num_workers,
                        pin_memory=accelerator.device.type == "cuda")
    moments, faults = [], {}
    for batch in tqdm(loader, desc="caching", unit="batch", disable=not accelerator.is_local_main_process):
        pixels = batch["pixels"].to(accelerator.device, non_blocking=True)
        moments.append(encode_views(models.vae, pixels, flips=not args.no_hflip).cpu())
        faults |= {int(row): json.loads(found) for row, found in zip(batch["row"], batch["faults"]) if found}
        last = int(batch["row"][-1])
        if last + 1 == rows or (last + 1) % per_shard == 0:
            write_shard(folder / names[last // per_shard], with_checks({"moments": torch.cat(moments)}, dims=3),
                        {"faults": json.dumps(faults)})
            moments, faults = [], {}
    return names


def save_rows(table: datasets.Dataset, columns: list[str], folder: Path) -> None:
    """The table with empty image columns, so that pairs are chosen from it by the same rules."""
    empty = datasets.Dataset.from_dict({name: [None] * len(table) for name in columns})
    table = datasets.concatenate_datasets([table.remove_columns(columns), empty], axis=1)
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    table.save_to_disk(aside)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def claim_folder(folder: Path, settings: dict) -> None:
    """Start a cache in `folder`, or continue the one that was begun there with the same settings, and hold it against
    other programs. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = sorted({path.name for path in folder.iterdir()} - {LOCK_FILE, f".{SETTINGS}.partial"})
        if others and not (folder / SETTINGS).is_file():
            raise UserError(f"{folder} holds files that are no cache ({', '.join(others[:3])}): choose an empty folder")
        hold(folder, "--cached_dataset")
        if (folder / SETTINGS).is_file():
            begun = read_settings(folder, "")
            differences = [f"{name} {begun.get(name)!r} instead of {settings[name]!r}" for name in settings
                           if begun.get(name) != settings[name]]
            if differences:
                raise UserError(f"{folder} holds another cache ({'; '.join(differences)}): choose another folder")
            return
        write_whole(folder / SETTINGS, json.dumps(settings, indent=1))
    except OSError as error:
        raise UserError(f"cannot write to --cached_dataset {folder}: {error.strerror}") from None


def make_cache(args: TrainArguments, options: CacheArguments, accelerator: Accelerator) -> None:
    """Load what the arguments name and encode it. Raises UserError."""
    models = load_tokenizers_and_scheduler(args)
    with accelerator.main_process_first():
        table = load_table(args)
    labels = np.ones(len(table)) if args.choice_model else None  # those come later, from the images
    columns = choose_pairs(table, args, 0, labels).image_columns  # which also tells what is wrong with the table
    load_frozen_encoders(models, args, COMPUTE_DTYPES[args.mixed_precision], accelerator.device)
    encode_table(table, columns, models, args, options, accelerator)


def encode_table(table: datasets.Dataset, columns: list[str], models: Models, args: TrainArguments,
                 options: CacheArguments, accelerator: Accelerator) -> None:
    """Write the whole cache, or what is missing of it; every process must call this. Raises UserError."""
    folder = Path(args.cached_dataset)
    prompts = list(dict.fromkeys(["", *usable_captions(column_values(table, args.caption_column))]))
    settings = cache_settings(args, models, columns, prompts) | {
        "rows": len(table), "content": content_digest(table, args), "pairs_per_shard": options.pairs_per_shard}
    problem = None
    if accelerator.is_main_process:
        try:
            claim_folder(folder, settings)
        except UserError as error:
            problem = str(error)
    raise_together(accelerator, problem)

    what = f"the cache in {folder}"
    with writing(accelerator, what, folder, "--cached_dataset"):
        if accelerator.is_main_process:
            print(f"Caching {len(table)} rows and {len(prompts)} prompts into {folder}", flush=True)
            (folder / MANIFEST).unlink(missing_ok=True)  # a finished cache is unfinished while its rows are written anew
            write_whole(folder / PROMPTS, json.dumps(prompts, ensure_ascii=False))
            save_rows(table, columns, folder / ROWS)
    with writing(accelerator, what, folder, "--cached_dataset"):
        names = write_prompts(folder, prompts, models, args, options, accelerator)
        names += write_pairs(folder, table, columns, models, args, options, accelerator)
    with writing(accelerator, what, folder, "--cached_dataset"):
        if accelerator.is_main_process:
            faults = {}
            for name in names:
                with safe_open(folder / name, framework="np") as file:
                    faults |= json.loads((file.metadata() or {}).get("faults", "{}"))
            files = [folder / PROMPTS, *sorted(path for path in (folder / ROWS).iterdir())]
            manifest = {"shards": {name: (folder / name).stat().st_size for name in names},
                        "files": {path.relative_to(folder).as_posix(): digest(path) for path in files}, "faults": faults,
                        "pairs_per_shard": options.pairs_per_shard, "prompts_per_shard": PROMPTS_PER_SHARD}
            write_whole(folder / MANIFEST, json.dumps(manifest, indent=1))
            size = sum(manifest["shards"].values()) / 2**20
            print(f"Done: {folder}, {size:.1f} MiB, {len(faults)} rows with images that cannot be used", flush=True)
            release(folder)


def main() -> None:
    args, options = parse_arguments(None, CacheArguments)
    if not args.cached_dataset:
        raise UserError("name the folder that the cache is written to: --cached_dataset DIR")
    if args.data_source is None:
        raise UserError("name the pairs to cache: --dataset_name (hub id, folder or parquet) or --train_data_dir")
    for name, value in vars(options).items():
        if value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}")
    make_cache(args, options, start_accelerator(args))


if __name__ == "__main__":
    run_program(main)
