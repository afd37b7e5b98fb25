"""Writing a cache: every image and prompt of a table, encoded once, into shards that appear whole.

Moments and embeddings are kept in the dtype in which the encoders answer, so nothing is rounded: a cached run sees the
numbers that an uncached one computes. Kernels round otherwise for another batch size (CLIP's projection does), so the
encoders are given full batches, by default of the training's own size. Every entry of a shard has its CRC-32 beside it.
Shards that are there are kept, and processes share the rest.
"""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from common.errors import UserError
from common.files import digest, whole_file, write_json
from common.locks import LOCK_FILE, hold, release
from common.progress import progress_bar
from common.train_options import DataOptions, TrainOptions
from data.bad_pairs import BadPair, decode_images, read_row, usable_captions
from data.cached import MANIFEST, PROMPTS, ROWS, SETTINGS, cache_settings, read_settings, with_checks
from data.images import cut_square, scale_pixels
from data.layouts import caption_column
from data.pairs import worker_count
from data.choosing import choose_pairs
from data.table import column_values, content_digest, load_table
from models.devices import COMPUTE_DTYPES, raising_together, writing
from models.family import Family
from models.guidance import encode_prompts

PROMPTS_PER_SHARD = 2048


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
def encode_views(family: Family, pixels: Tensor, flips: bool) -> Tensor:
    """uint8 images (B, k, 3, H, W) -> moments (B, k, views, 2C, h, w): as they are and, with `flips`, mirrored."""
    images = scale_pixels(pixels.flatten(0, 1))
    moments = [family.encode_images(view) for view in ([images, images.flip(-1)] if flips else [images])]
    return torch.stack(moments, dim=1).unflatten(0, pixels.shape[:2])


def write_shard(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    with whole_file(path) as aside:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside, metadata)


def write_prompts(folder: Path, prompts: list[str], family: Family, batch_size: int,
                  accelerator: Accelerator) -> list[str]:
    """This process's share of the prompt shards; returns the names of all of them."""
    names = [f"prompts-{number:05}.safetensors" for number in range(-(-len(prompts) // PROMPTS_PER_SHARD))]
    for number in range(accelerator.process_index, len(names), accelerator.num_processes):
        if (folder / names[number]).is_file():
            continue
        parts = []
        shard = prompts[number * PROMPTS_PER_SHARD:(number + 1) * PROMPTS_PER_SHARD]
        for start in range(0, len(shard), batch_size):
            captions = shard[start:start + batch_size]
            filled = captions + captions[-1:] * (batch_size - len(captions))
            part = encode_prompts(family, filled, accelerator.device)
            parts.append({name: tensor[:len(captions)].cpu() for name, tensor in part.items()})
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        write_shard(folder / names[number], with_checks(tensors, dims=1))
    return names


def write_pairs(folder: Path, table: datasets.Dataset, columns: list[str], family: Family, data: DataOptions,
                per_shard: int, batch_size: int, accelerator: Accelerator) -> list[str]:
    """This process's share of the image shards; returns the names of all of them."""
    rows = len(table)
    names = [f"pairs-{number:05}.safetensors" for number in range(-(-rows // per_shard))]
    mine = [number for number in range(accelerator.process_index, len(names), accelerator.num_processes)
            if not (folder / names[number]).is_file()]
    batches = [list(range(start, min(start + batch_size, (number + 1) * per_shard, rows)))
               for number in mine
               for start in range(number * per_shard, min((number + 1) * per_shard, rows), batch_size)]
    dataset = ImageRows(table, columns, data.resolution)
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=worker_count(data.dataloader_num_workers),
                        pin_memory=accelerator.device.type == "cuda")
    moments, faults = [], {}
    for batch in progress_bar(loader, desc="caching", unit="batch", disable=not accelerator.is_local_main_process):
        pixels = batch["pixels"].to(accelerator.device, non_blocking=True)
        filled = torch.cat([pixels, pixels[-1:].expand(batch_size - len(pixels), *pixels.shape[1:])])
        moments.append(encode_views(family, filled, flips=not data.no_hflip)[:len(pixels)].cpu())
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
        others = sorted({path.name for path in folder.iterdir() if not path.name.endswith('.partial')} - {LOCK_FILE})
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
        write_json(folder / SETTINGS, settings)
    except OSError as error:
        raise UserError(f"cannot write to --cached_dataset {folder} ({error.strerror}): name another") from None


def make_cache(options: TrainOptions, family: Family, accelerator: Accelerator, pairs_per_shard: int,
               batch_size: int | None) -> None:
    """Load what the options name and encode it. Raises UserError."""
    data = options.data
    with accelerator.main_process_first():
        table = load_table(data, options.model.cache_dir)
    labels = np.ones(len(table)) if data.choice_model else None  # those come later, from the images
    pairs = choose_pairs(table, data, 0, labels, options.objective.train_method)  # which also reports a faulty table
    columns = pairs.image_columns
    family.load_encoders(COMPUTE_DTYPES[options.memory.mixed_precision], accelerator.device)
    encode_table(table, columns, family, data, options.memory.mixed_precision, accelerator, pairs_per_shard,
                 batch_size or options.optimizer.train_batch_size)


def encode_table(table: datasets.Dataset, columns: list[str], family: Family, data: DataOptions, mixed_precision: str,
                 accelerator: Accelerator, pairs_per_shard: int = 1024, batch_size: int = 8) -> None:
    """Write the whole cache, or what is missing of it; every process must call this. Raises UserError."""
    folder = Path(data.cached_dataset)
    prompts = list(dict.fromkeys(["", *usable_captions(column_values(table, caption_column(table.column_names, data)))]))
    settings = cache_settings(data, family, mixed_precision, columns) | {
        "rows": len(table), "content": content_digest(table, data), "pairs_per_shard": pairs_per_shard}
    with raising_together():
        if accelerator.is_main_process:
            claim_folder(folder, settings)

    what = f"the cache in {folder}"
    with writing(what, folder, "--cached_dataset"):
        if accelerator.is_main_process:
            print(f"Caching {len(table)} rows and {len(prompts)} prompts into {folder}", flush=True)
            (folder / MANIFEST).unlink(missing_ok=True)  # a finished cache is unfinished while its rows are written again
            write_json(folder / PROMPTS, prompts)
            save_rows(table, columns, folder / ROWS)
    with writing(what, folder, "--cached_dataset"):
        names = write_prompts(folder, prompts, family, batch_size, accelerator)
        names += write_pairs(folder, table, columns, family, data, pairs_per_shard, batch_size, accelerator)
    with writing(what, folder, "--cached_dataset"):
        if accelerator.is_main_process:
            faults = {}
            for name in names:
                with safe_open(folder / name, framework="np") as file:
                    faults |= json.loads((file.metadata() or {}).get("faults", "{}"))
            files = [folder / PROMPTS, *sorted(path for path in (folder / ROWS).iterdir())]
            manifest = {"shards": {name: (folder / name).stat().st_size for name in names},
                        "files": {path.relative_to(folder).as_posix(): digest(path) for path in files}, "faults": faults,
                        "pairs_per_shard": pairs_per_shard, "prompts_per_shard": PROMPTS_PER_SHARD}
            write_json(folder / MANIFEST, manifest)
            size = sum(manifest["shards"].values()) / 2**20
            print(f"Done: {folder}, {size:.1f} MiB, {len(faults)} rows with images that cannot be used", flush=True)
            release(folder)
