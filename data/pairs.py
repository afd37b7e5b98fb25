"""Preference pairs: loading, choosing and labelling them, and turning one into tensors."""

import glob
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
import torch
from torch.utils.data import DataLoader

from training.options import TrainArguments
from data.bad_pairs import BadPair, decode_images, read_caption, read_row
from data.cached import CachedDataset, is_local
from data.draws import PairDraw, PairStream, draw_pair
from common.errors import UserError, first_line
from data.images import cut_square
from common.signals import outlive_signals

MAX_PASSED_OVER = 100  # bad pairs in a row, after which there is little hope for a good one
MAX_CAPTION_CHARACTERS = 20_000  # 77 tokens never reach so far, and tokenizing a whole book takes seconds


# --- loading -----------------------------------------------------------------------------------------------------------

def load_table(args: TrainArguments) -> datasets.Dataset:
    """The split named by the arguments, images still encoded. Raises UserError when it cannot be had."""
    source = args.data_source
    path = Path(source)
    if path.exists() and glob.escape(source) != source:
        raise UserError(f"the path {source} holds one of * ? [, which datasets reads as a pattern: rename it")
    try:
        if path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            table = datasets.load_from_disk(source)
            if isinstance(table, datasets.DatasetDict):
                table = table[args.split]
            else:
                check_only_split(args)
        elif path.is_file():
            check_only_split(args)
            table = datasets.load_dataset("parquet", data_files={args.split: source}, split=args.split,
                                          cache_dir=args.cache_dir)
        elif args.train_data_dir and not path.is_dir():
            raise UserError(f"--train_data_dir {source}: no such folder or parquet file")
        else:
            table = datasets.load_dataset(source, args.dataset_config_name, split=args.split, cache_dir=args.cache_dir)
    except UserError:
        raise
    except KeyError:
        raise UserError(f"{source} has no split '{args.split}': choose one with --split") from None
    except Exception as error:  # datasets and its readers raise many kinds; each is a fault of the named dataset
        raise UserError(f"cannot load the dataset {source}: no such folder here, or the hub does not give it or cannot "
                        f"be reached ({type(error).__name__}: {first_line(error)[:200]})") from None
    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    return table


def check_only_split(args: TrainArguments) -> None:
    if args.split != "train":
        raise UserError(f"{args.data_source} holds one table without splits: drop --split {args.split}")


def load_rows(args: TrainArguments, cache: CachedDataset | None) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The table that pairs are chosen from, and the one with the images; of a cache the former, and the latter where it
    is at hand or is looked at. Raises UserError, also where local data is not what the cache was made of."""
    if cache is None:
        table = load_table(args)
        return table, table
    compared = is_local(args) and args.split == cache.settings.get("split")
    images = load_table(args) if args.choice_model or compared else None
    if images is not None and content_digest(images, args) != cache.settings.get("content"):
        raise UserError(f"{args.data_source} (split {args.split}) is not the data that --cached_dataset {cache.folder} was made "
                        "of, or not in its order: name no data and take the cache's rows, or cache again into an empty folder")
    return cache.rows(), images


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


def content_digest(table: datasets.Dataset, args: TrainArguments) -> str:
    """Identity of the rows without reading an image: captions, labels, and the length of each encoded image."""
    sha = hashlib.sha256()
    for name in (args.caption_column, "label_0"):
        for value in column_values(table, name) if name in table.column_names else ():
            sha.update(repr(value).encode("utf-8", "surrogatepass"))
    for name in ("jpg_0", "jpg_1", args.image_column):
        columns = table.select_columns(name).with_format("arrow")[:][name].chunks if name in table.column_names else ()
        for chunk in columns:
            if pyarrow.types.is_struct(chunk.type) and chunk.type.get_field_index("bytes") >= 0:
                chunk = chunk.field("bytes")
            if pyarrow.types.is_binary(chunk.type) or pyarrow.types.is_large_binary(chunk.type):
                chunk = pyarrow.compute.binary_length(chunk)
            sha.update(repr(chunk.to_pylist()).encode("utf-8", "surrogatepass"))
    return sha.hexdigest()


@dataclass
class PairTable:
    """rows: the table. index: (n,) the usable rows. first_wins: (n,) bool, image 0 is the winner. image_columns: two,
    or the one of a dataset without pairs (sft). notes: what was dropped, for the start-up summary."""

    rows: datasets.Dataset
    index: np.ndarray
    first_wins: np.ndarray
    caption_column: str
    image_columns: list[str]
    notes: list[str]

    def __len__(self) -> int:
        return len(self.index)

    def digest(self) -> str:
        """Identity of the choice: which rows of how many, their captions, and who wins."""
        sha = hashlib.sha256(len(self.rows).to_bytes(8, "big") + self.index.tobytes() + self.first_wins.tobytes())
        for caption in column_values(self.rows, self.caption_column):
            sha.update(repr(caption).encode("utf-8", "surrogatepass"))
        return sha.hexdigest()[:16]


def choose_pairs(table: datasets.Dataset, args: TrainArguments, seed: int,
                 labels: np.ndarray | None = None) -> PairTable:
    """Which rows are trained on, and who wins (method rules: label_0 is 1, 0 or 0.5; 0.5 is dropped).

    labels: (rows,) replaces label_0, for AI feedback. Raises UserError for missing columns, labels outside
    {0, 0.5, 1}, or when nothing is left.
    """
    names, notes = table.column_names, []
    source = args.data_source or f"the cache {args.cached_dataset}"
    single = None
    if args.train_method == "sft" and "jpg_0" not in names and args.image_column in names:
        single, needed = args.image_column, [args.caption_column]
    else:
        needed = [args.caption_column, "jpg_0", "jpg_1"] + (["label_0"] if labels is None else [])
    needed += ["model_0", "model_1"] if args.dreamlike_pairs_only else []
    missing = [name for name in needed if name not in names]
    if missing:
        raise UserError(f"{source} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; it has "
                        f"{', '.join(names)}. Pairs need caption, jpg_0, jpg_1 and label_0")

    keep = np.ones(len(table), dtype=bool)
    first_wins = np.ones(len(table), dtype=bool)
    if single is None:
        labels = column_values(table, "label_0") if labels is None else labels
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
                            f"({len(odd)} such rows)")
        first_wins, keep = values == 1.0, values != 0.5
        undecided = int((~keep).sum() - unlabelled.sum())
        if args.choice_model:
            notes.append(f"{len(table)} pairs have their labels by {args.choice_model}")
        notes.append(f"{undecided} of {len(table)} pairs dropped without a decision (label_0 = 0.5)")
        if unlabelled.any():
            notes.append(f"{int(unlabelled.sum())} pairs dropped without a label")
    if args.dreamlike_pairs_only:
        dream = np.array(["dream" in str(a).lower() and "dream" in str(b).lower()
                          for a, b in zip(column_values(table, "model_0"), column_values(table, "model_1"))], dtype=bool)
        notes.append(f"{int((keep & ~dream).sum())} pairs dropped that are not of two Dreamlike models")
        keep &= dream
    index = np.flatnonzero(keep)
    if args.max_train_samples is not None and args.max_train_samples < len(index):
        index = np.random.default_rng([seed, 2]).permutation(index)[:args.max_train_samples]
        notes.append(f"{len(index)} kept by --max_train_samples")
    if len(index) == 0:
        raise UserError(f"no usable pair is left of {len(table)} in {source}: {'; '.join(notes) or 'it is empty'}")
    image_columns = [single] if single else ["jpg_0", "jpg_1"]
    return PairTable(table, index, first_wins[index], args.caption_column, image_columns, notes)


# --- one pair ----------------------------------------------------------------------------------------------------------

class PairDataset(torch.utils.data.Dataset):
    """(position, index) -> one pair as tensors: everything that the training step needs and that is random about it.

    A pair that cannot be used is replaced by the next one that can; what is random belongs to the position and stays.
    passed_over (): how many were.

    pixel_values (2, 3, H, W) uint8, winner first (sft: (1, ...)); timestep () in [0, 1); noise (C, h, w);
    vae_noise (2, C, h, w); input_ids.N (77,) for each tokenizer; position (), index ().
    With a cache, in place of pixel_values and input_ids: moments (2, 2C, h, w), embeddings (77, D), pooled (P,).
    """

    def __init__(self, pairs: PairTable, tokenizers: list, args: TrainArguments, seed: int,
                 latent_shape: tuple[int, int, int], cache: CachedDataset | None = None):
        self.pairs, self.tokenizers, self.args, self.seed = pairs, tokenizers, args, seed
        self.latent_shape, self.cache = latent_shape, cache

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, place: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Raises UserError after MAX_PASSED_OVER pairs in a row that cannot be used."""
        position, index = place
        draw = self.draw(position)
        for passed_over in range(min(len(self), MAX_PASSED_OVER)):
            try:
                pair = self.read((index + passed_over) % len(self), draw)
            except BadPair as error:
                last = error
                continue
            noise = draw.noise + self.args.noise_offset * draw.offset_noise if self.args.noise_offset else draw.noise
            if draw.perturbation is not None:
                pair["input_noise"] = noise + self.args.input_perturbation * draw.perturbation
            return pair | {
                "noise": noise,
                "timestep": torch.tensor(draw.timestep, dtype=torch.float64),
                "position": torch.tensor(position),
                "index": torch.tensor(index),
                "passed_over": torch.tensor(passed_over),
            }
        raise UserError(f"{passed_over + 1} pairs in a row cannot be used, from row {self.row(index)} on; the last one's "
                        f"{last}. python -m data.check looks through all of them")

    def draw(self, position: int) -> PairDraw:
        return draw_pair(self.seed, position, self.latent_shape, perturb=self.args.input_perturbation > 0)

    def row(self, index: int) -> int:
        """The table's row of a pair's index."""
        return int(self.pairs.index[index % len(self)])

    def faults(self, position: int, index: int, passed_over: int) -> list[dict]:
        """Row, column and reason of the pairs that were passed over at a position."""
        draw, faults = self.draw(position), []
        for number in range(index, index + passed_over):
            try:
                self.read(number % len(self), draw)
            except BadPair as error:
                faults.append({"position": position, "row": self.row(number), "column": error.column,
                               "reason": error.reason, "replaced_by": self.row(index + passed_over)})
        return faults

    def read(self, index: int, draw: PairDraw) -> dict[str, torch.Tensor]:
        """A pair's images and caption as they go into the step. Raises BadPair."""
        args = self.args
        row = read_row(self.pairs.rows, self.row(index))
        caption = read_caption(row, self.pairs.caption_column)
        caption = "" if draw.drop_prompt < args.proportion_empty_prompts else caption
        members = [0, 1] if self.pairs.first_wins[index] else [1, 0]  # of the image columns, winner first
        members = members[:1] if args.train_method == "sft" else members
        uniform = draw.flip[[0, 0]] if args.paired_hflip else draw.flip
        flips = [not args.no_hflip and bool(uniform[i] < 0.5) for i in range(len(members))]
        item = {"vae_noise": draw.vae_noise[:len(members)]}
        columns = [self.pairs.image_columns[member] for member in members]
        if self.cache is not None:
            self.cache.check_images(self.row(index), columns)
            return item | {"moments": self.cache.moments(self.row(index), members, flips)} | self.cache.prompt(caption)
        crops = draw.crop if args.random_crop else [None, None]
        images = decode_images(row, columns)
        item["pixel_values"] = torch.stack([cut_square(image, args.resolution, crop, flip)
                                            for image, crop, flip in zip(images, crops, flips)])
        for number, tokenizer in enumerate(self.tokenizers):
            item[f"input_ids.{number}"] = tokenize(tokenizer, [caption])[0]
        return item


def tokenize(tokenizer, captions: list[str]) -> torch.Tensor:
    """(N, 77) token ids, padded and truncated."""
    captions = [caption[:MAX_CAPTION_CHARACTERS] for caption in captions]
    return tokenizer(captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length,
                     return_tensors="pt").input_ids


def worker_count(asked: int) -> int:
    """Data workers of a process: as many as asked for, but not more than it may use cores."""
    return min(asked, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def make_loader(dataset: PairDataset, args: TrainArguments, rank: int, world_size: int, first_step: int,
                last_step: int, pin_memory: bool, pairs_seen: int | None = None) -> DataLoader:
    """Micro-batches for the optimizer steps first_step..last_step-1 of this process, pairs stacked: (B, ...).

    pairs_seen: the position at which first_step begins, where the steps before it had another size.
    """
    accumulation = args.gradient_accumulation_steps
    stream = PairStream(len(dataset), args.train_batch_size, rank, world_size, dataset.seed,
                        shuffle=args.split == "train", first_micro_step=first_step * accumulation,
                        last_micro_step=last_step * accumulation)
    if pairs_seen is not None:
        stream.origin = pairs_seen - first_step * accumulation * world_size * args.train_batch_size
    workers = worker_count(args.dataloader_num_workers)
    return DataLoader(dataset, batch_sampler=stream, num_workers=workers, pin_memory=pin_memory,
                      persistent_workers=workers > 0, prefetch_factor=4 if workers else None,
                      worker_init_fn=outlive_signals)
