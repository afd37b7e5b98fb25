"""Pick-a-Pic pairs for the step-aware preference model: both images in their own order, with a soft label."""

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import functional as F

from common.train_options import warn
from data.bad_pairs import BadPair, decode_images, read_caption, read_row
from data.pairs import MAX_PASSED_OVER, column_values
from data.draws import draw_pair
from common.errors import UserError, first_line
from data.images import scale_pixels

COLUMNS = ("jpg_0", "jpg_1", "label_0")


def clip_square(image: Image.Image, size: int) -> Tensor:
    """RGB image -> (3, size, size) uint8 as CLIP's own image processor cuts it: the short side to `size` by PIL's bicubic,
    then the centre (odd margins rounded down)."""
    image = F.resize(image, size, interpolation=F.InterpolationMode.BICUBIC)
    return F.pil_to_tensor(F.crop(image, (image.height - size) // 2, (image.width - size) // 2, size, size))


class LabelledPairs(Dataset):
    """(position, index) -> one pair as tensors; ties stay in.

    A pair that cannot be used is replaced by the next one that can; timestep and noises belong to the position and
    stay. passed_over (): how many were.

    pixel_values (2, 3, H, W) in [-1, 1], image 0 first: what is noised, and looked at as it is for the accuracy at t = 0.
    With judge_size also judged (2, 3, judge_size, judge_size) uint8, cut from the original for PickScore, which relabels.
    Both by CLIP's bicubic (clip_square), as the official pick_a_pic_spm_dataset.py and spm_task.py have it.
    label_0 () the probability that image 0 is preferred; weight () 1 / number of the prompt's pairs; caption; timestep ()
    in [0, 1), noise (C, h, w) and vae_noise (2, C, h, w), which follow from (seed, position). Raises UserError for missing columns, odd labels, or when no row has a label.
    """

    def __init__(self, table: datasets.Dataset, caption_column: str, resolution: int,
                 latent_shape: tuple[int, int, int], seed: int, source: str, judge_size: int | None = None):
        missing = [name for name in (*COLUMNS, caption_column) if name not in table.column_names]
        if missing:
            raise UserError(f"{source} lacks {', '.join(missing)}; it has {', '.join(table.column_names)}. Pairs need "
                            "caption, jpg_0, jpg_1 and label_0")
        self.table, self.caption_column, self.resolution = table, caption_column, resolution
        self.latent_shape, self.seed, self.judge_size = latent_shape, seed, judge_size
        try:
            labels = np.array([np.nan if label is None else label for label in column_values(table, "label_0")],
                              dtype=float)
        except (TypeError, ValueError) as error:
            raise UserError(f"{source}: label_0 must be 0, 0.5 or 1 ({first_line(error)})") from None
        self.index = np.flatnonzero(~np.isnan(labels))
        self.labels = labels[self.index]
        if len(self.index) < len(labels):
            warn(f"{len(labels) - len(self.index)} of {len(labels)} pairs of {source} have no label and are dropped")
        odd = np.flatnonzero(~np.isin(self.labels, (0.0, 0.5, 1.0)))
        if len(odd):
            raise UserError(f"{source}: label_0 must be 0, 0.5 or 1, but row {self.index[odd[0]]} has {self.labels[odd[0]]}")
        if len(self.index) == 0:
            raise UserError(f"{source} holds no labelled pair")
        self.weights = 1.0 / self._pairs_of_each_prompt()

    def _pairs_of_each_prompt(self) -> np.ndarray:
        """Pick-a-Pic's own count (its published splits leave pairs out), else the rows that share the caption."""
        if "num_example_per_prompt" in self.table.column_names:
            counts = column_values(self.table, "num_example_per_prompt")[self.index].astype(float)
            return np.nan_to_num(counts, nan=1.0).clip(min=1)
        _, inverse, counts = np.unique(column_values(self.table, self.caption_column)[self.index].astype(str),
                                       return_inverse=True, return_counts=True)
        return counts[inverse].astype(float)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, place: tuple[int, int]) -> dict:
        """Raises UserError after MAX_PASSED_OVER pairs in a row that cannot be used."""
        position, index = place
        draw = draw_pair(self.seed, position, self.latent_shape)
        for passed_over in range(min(len(self), MAX_PASSED_OVER)):
            try:
                pair = self.read((index + passed_over) % len(self))
            except BadPair as error:
                last = error
                continue
            return pair | {
                "timestep": torch.tensor(draw.timestep, dtype=torch.float64),
                "noise": draw.noise,
                "vae_noise": draw.vae_noise,
                "passed_over": torch.tensor(passed_over),
            }
        raise UserError(f"{passed_over + 1} pairs in a row cannot be used, from row {self.index[index]} on; the last "
                        f"one's {last}. python -m data.check looks through all of them")

    def read(self, index: int) -> dict:
        """A pair's images, caption, label and weight. Raises BadPair."""
        row = read_row(self.table, int(self.index[index]))
        caption = read_caption(row, self.caption_column)
        images = decode_images(row, ["jpg_0", "jpg_1"])
        pair = {
            "pixel_values": torch.stack([scale_pixels(clip_square(image, self.resolution)) for image in images]),
            "label_0": torch.tensor(self.labels[index], dtype=torch.float32),
            "weight": torch.tensor(self.weights[index], dtype=torch.float32),
            "caption": caption,
        }
        if self.judge_size:
            pair["judged"] = torch.stack([clip_square(image, self.judge_size) for image in images])
        return pair
