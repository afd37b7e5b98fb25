"""One preference pair as tensors, and the loader that batches them."""

import os
from collections.abc import Callable

import torch
from torch.utils.data import DataLoader

from common.errors import UserError
from common.signals import outlive_signals
from data.bad_pairs import BadPair, decode_images, read_caption, read_row
from data.cached import CachedDataset
from data.draws import PairDraw, PairStream, draw_pair
from data.images import cut_square
from common.train_options import DataOptions
from data.choosing import PairTable
from models.family import Text

MAX_PASSED_OVER = 100  # bad pairs in a row, after which there is little hope for a good one


class PairDataset(torch.utils.data.Dataset):
    """(position, index) -> one pair as tensors: everything that the training step needs and that is random about it.

    A pair that cannot be used is replaced by the next one that can; what is random belongs to the position and stays.
    passed_over (): how many were.

    pixel_values (2, 3, H, W) uint8, winner first (with winners_only (1, ...)); timestep () in [0, 1); noise (C, h, w);
    vae_noise (2, C, h, w); tokens.NAME for each of the family's; position (), index (). Of single images (1, ...) each, and
    liked () bool.
    With a cache, in place of pixel_values and tokens: moments (2, 2C, h, w) and text.NAME.
    """

    @property
    def shuffle(self) -> bool:
        return self.data.split == "train"

    def __init__(self, pairs: PairTable, data: DataOptions, seed: int, latent_shape: tuple[int, int, int],
                 tokenize: Callable[[list[str]], Text], cache: CachedDataset | None = None, winners_only: bool = False):
        """tokenize: the family's."""
        self.pairs, self.data, self.seed, self.tokenize = pairs, data, seed, tokenize
        self.latent_shape, self.cache, self.winners_only = latent_shape, cache, winners_only

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
            noise = draw.noise + self.data.noise_offset * draw.offset_noise if self.data.noise_offset else draw.noise
            if draw.perturbation is not None:
                pair["input_noise"] = noise + self.data.input_perturbation * draw.perturbation
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
        return draw_pair(self.seed, position, self.latent_shape, perturb=self.data.input_perturbation > 0)

    def row(self, index: int) -> int:
        """The table's row of a pair's index."""
        return int(self.pairs.index[index % len(self)])

    def faults(self, position: int, index: int, passed_over: int) -> list[dict]:
        """Row, column and reason of the pairs that were skipped at a position."""
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
        data = self.data
        row = read_row(self.pairs.rows, self.row(index))
        caption = read_caption(row, self.pairs.caption_column)
        caption = "" if draw.drop_prompt < data.proportion_empty_prompts else caption
        wins = bool(self.pairs.first_wins[index])
        if self.pairs.paired:
            members = [0, 1] if wins else [1, 0]  # of the image columns, winner first
            members = members[:1] if self.winners_only else members
        else:
            members = [0]
        uniform = draw.flip[[0, 0]] if data.paired_hflip else draw.flip
        flips = [not data.no_hflip and bool(uniform[i] < 0.5) for i in range(len(members))]
        item = {"vae_noise": draw.vae_noise[:len(members)]} | ({} if self.pairs.paired else {"liked": torch.tensor(wins)})
        columns = [self.pairs.image_columns[member] for member in members]
        if self.cache is not None:
            self.cache.check_images(self.row(index), columns)
            text = {f"text.{name}": value for name, value in self.cache.prompt(caption).items()}
            return item | {"moments": self.cache.moments(self.row(index), members, flips)} | text
        crops = draw.crop if data.random_crop else [None, None]
        images = decode_images(row, columns)
        item["pixel_values"] = torch.stack([cut_square(image, data.resolution, crop, flip)
                                            for image, crop, flip in zip(images, crops, flips)])
        return item | {f"tokens.{name}": ids[0] for name, ids in self.tokenize([caption]).items()}


def worker_count(asked: int) -> int:
    """Data workers of a process: as many as asked for, but not more than it may use cores."""
    return min(asked, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def make_loader(dataset: PairDataset, batch_size: int, rank: int, world_size: int, first_position: int, micro_steps: int,
                pin_memory: bool) -> DataLoader:
    """This process's next `micro_steps` micro-batches, pairs stacked: (B, ...); first_position: how many pairs were seen."""
    stream = PairStream(len(dataset), batch_size, rank, world_size, dataset.seed, shuffle=dataset.shuffle,
                        first_position=first_position, micro_steps=micro_steps)
    workers = worker_count(dataset.data.dataloader_num_workers)
    return DataLoader(dataset, batch_sampler=stream, num_workers=workers, pin_memory=pin_memory,
                      persistent_workers=workers > 0, prefetch_factor=4 if workers else None,
                      worker_init_fn=outlive_signals)
