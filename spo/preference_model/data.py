"""Preference pairs for the step-aware preference model: both images in their own order, with a soft label."""

import math
from dataclasses import replace

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F

from common.errors import UserError, warn
from common.train_options import DataOptions
from data.bad_pairs import decode_images, read_caption, read_row
from data.draws import PairDraw
from data.images import scale_pixels
from data.pairs import PairDataset
from data.choosing import PairTable, label_values, labels_of, layout_of
from data.table import column_values, load_table
from spo.preference_model.options import PICKAPIC_VALIDATION

HELD_OUT_SHARE, MOST_HELD_OUT = 0.05, 500  # of the prompts of data without a validation split; Pick-a-Pic's has 500 pairs


def clip_square(image: Image.Image, size: int) -> Tensor:
    """RGB image -> (3, size, size) uint8 as CLIP's own image processor cuts it: the short side to `size` by PIL's bicubic,
    then the centre (odd margins rounded down)."""
    image = F.resize(image, size, interpolation=F.InterpolationMode.BICUBIC)
    return F.pil_to_tensor(F.crop(image, (image.height - size) // 2, (image.width - size) // 2, size, size))


class LabelledPairs(PairDataset):
    """(position, index) -> one pair as tensors; ties stay in. A pair that cannot be used is replaced as PairDataset does it.

    pixel_values (2, 3, H, W) in [-1, 1], image 0 first: what is noised, and looked at as it is for the accuracy at t = 0.
    With judge_size also judged (2, 3, judge_size, judge_size) uint8, cut from the original for PickScore, which relabels.
    Both by CLIP's bicubic (clip_square), as the official pick_a_pic_spm_dataset.py and spm_task.py have it.
    label_0 () the probability that image 0 is preferred; weight () 1 / number of the prompt's pairs; caption; timestep ()
    in [0, 1), noise (C, h, w) and vae_noise (2, C, h, w), which follow from (seed, position); position, index, passed_over.
    """

    shuffle = True

    def __init__(self, table: datasets.Dataset, data: DataOptions, latent_shape: tuple[int, int, int], seed: int,
                 source: str, rows: np.ndarray | None = None, judge_size: int | None = None):
        """rows: those of the table that are meant (None: all). Raises UserError for an unknown layout (data/layouts.py), odd
        labels, or when no row has a label."""
        layout = layout_of(table, data, "pairs")
        rows = np.arange(len(table)) if rows is None else rows
        labels = label_values(labels_of(table, layout, source), source)[rows]
        labelled = ~np.isnan(labels)
        index, self.labels = rows[labelled], labels[labelled]
        if len(index) < len(rows):
            warn(f"{len(rows) - len(index)} of {len(rows)} pairs of {source} have no label and are dropped")
        if len(index) == 0:
            raise UserError(f"{source} holds no labelled pair: name the column that decides with --label_column")
        # first_wins has the soft labels here, so that the digest of the pairs knows them.
        pairs = PairTable(table, index, self.labels, layout.caption, layout.images, notes=[], layout=str(layout))
        super().__init__(pairs, data, seed, latent_shape, tokenize=None)
        self.judge_size = judge_size
        self.weights = 1.0 / self._pairs_of_each_prompt()

    def _pairs_of_each_prompt(self) -> np.ndarray:
        """Pick-a-Pic's own count (its published splits leave pairs out), else the rows that share the caption."""
        table, index = self.pairs.rows, self.pairs.index
        if "num_example_per_prompt" in table.column_names:
            counts = column_values(table, "num_example_per_prompt")[index].astype(float)
            return np.nan_to_num(counts, nan=1.0).clip(min=1)
        _, inverse, counts = np.unique(column_values(table, self.pairs.caption_column)[index].astype(str),
                                       return_inverse=True, return_counts=True)
        return counts[inverse].astype(float)

    def read(self, index: int, draw: PairDraw) -> dict:
        """A pair's images, caption, label and weight. Raises BadPair."""
        row = read_row(self.pairs.rows, self.row(index))
        caption = read_caption(row, self.pairs.caption_column)
        images = decode_images(row, self.pairs.image_columns)
        resolution = self.data.resolution
        pair = {
            "pixel_values": torch.stack([scale_pixels(clip_square(image, resolution)) for image in images]),
            "label_0": torch.tensor(self.labels[index], dtype=torch.float32),
            "weight": torch.tensor(self.weights[index], dtype=torch.float32),
            "caption": caption,
            "vae_noise": draw.vae_noise,
        }
        if self.judge_size:
            pair["judged"] = torch.stack([clip_square(image, self.judge_size) for image in images])
        return pair


def load_pairs(data: DataOptions, split: str, latent_shape: tuple[int, int, int], seed: int, cache_dir: str | None,
               ) -> tuple[LabelledPairs, LabelledPairs | None]:
    """Pairs to train on and to validate on, of the split (None for "none"). Local data without Pick-a-Pic's validation split
    is validated on pairs held out of those to train on. Raises UserError."""
    table, source = load_table(data, cache_dir), data.source
    caption = layout_of(table, data, "pairs").caption
    validation = rows = held_out = None
    if split != "none":
        try:
            validation = load_table(replace(data, split=split), cache_dir)
        except UserError:
            if split != PICKAPIC_VALIDATION or not data.is_local:
                raise
            validation = table
            rows, held_out = hold_out(table, caption, seed)
            warn(f"{source} has no split '{split}': {len(held_out)} of its {len(table)} pairs are held out of training to "
                 "validate on (choose a split with --validation_split, or 'none')")
    pairs = LabelledPairs(table, data, latent_shape, seed, source, rows)
    if validation is not None and (held_out is None or len(held_out)):
        validation = LabelledPairs(validation, data, latent_shape, seed, f"{source} ({split})", held_out)
    else:
        validation = None
    return pairs, validation


def hold_out(table: datasets.Dataset, caption_column: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows to train on and those to validate on: all pairs of some prompts, chosen by the seed."""
    _, prompt = np.unique(column_values(table, caption_column).astype(str), return_inverse=True)
    order = np.random.default_rng([seed, 6]).permutation(prompt.max() + 1)
    number = min(math.ceil(HELD_OUT_SHARE * len(order)), MOST_HELD_OUT, len(order) - 1)
    held_out = np.isin(prompt, order[:number])
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
