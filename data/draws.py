"""Everything random about a training pair, as a function of (seed, position in the stream of pairs).

So noise, timesteps, flips, crops and dropped prompts are the same for any number of processes, workers or restarts, on
any device, and resuming needs no random state: the position is enough.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def derived_seed(*key: int) -> int:
    """A seed for a key of non-negative integers; different keys give independent streams."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def seeded_generator(*key: int) -> torch.Generator:
    """A CPU generator for a key of non-negative integers."""
    return torch.Generator().manual_seed(derived_seed(*key))


@dataclass
class PairDraw:
    """crop: (2, 2) offsets in [0, 1) as (winner, loser) x (top, left). flip: (2,) in [0, 1). timestep and drop_prompt:
    uniforms in [0, 1). vae_noise: (2, C, h, w) for sampling both latents. noise: (C, h, w), shared by the pair.
    offset_noise: (C, 1, 1). perturbation: (C, h, w)."""

    crop: Tensor
    flip: Tensor
    drop_prompt: float
    timestep: float
    vae_noise: Tensor
    noise: Tensor
    offset_noise: Tensor
    perturbation: Tensor | None


def draw_pair(seed: int, position: int, latent_shape: tuple[int, int, int], perturb: bool = False) -> PairDraw:
    """The random numbers of the pair at `position` of the stream; latent_shape is (C, h, w)."""
    generator = seeded_generator(seed, 0, position)
    uniform = torch.rand(8, generator=generator, dtype=torch.float64)
    channels = latent_shape[0]
    return PairDraw(
        crop=uniform[:4].reshape(2, 2), flip=uniform[4:6], drop_prompt=float(uniform[6]), timestep=float(uniform[7]),
        vae_noise=torch.randn(2, *latent_shape, generator=generator),
        noise=torch.randn(latent_shape, generator=generator),
        offset_noise=torch.randn(channels, 1, 1, generator=generator),
        perturbation=torch.randn(latent_shape, generator=generator) if perturb else None,
    )


def epoch_order(num_pairs: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """The order in which an epoch visits the pairs: (num_pairs,) int64."""
    if not shuffle:
        return np.arange(num_pairs)
    return np.random.default_rng([seed, 1, epoch]).permutation(num_pairs)


class PairStream(torch.utils.data.Sampler):
    """Batches of (position, index) for one process, from a stream that runs through epoch after epoch.

    At micro-step m process r takes positions first_position + m * world * batch + r * batch ... + batch - 1. No pair is
    dropped at an epoch's end: a batch may hold the last of one epoch and the first of the next.
    """

    def __init__(self, num_pairs: int, batch_size: int, rank: int, world_size: int, seed: int, shuffle: bool,
                 first_position: int, micro_steps: int):
        self.num_pairs, self.batch_size, self.seed, self.shuffle = num_pairs, batch_size, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.first_position, self.micro_steps = first_position, micro_steps

    def __len__(self) -> int:
        return self.micro_steps

    def __iter__(self):
        epoch, order = -1, None
        for micro_step in range(self.micro_steps):
            first = self.first_position + (micro_step * self.world_size + self.rank) * self.batch_size
            batch = []
            for position in range(first, first + self.batch_size):
                if position // self.num_pairs != epoch:
                    epoch = position // self.num_pairs
                    order = epoch_order(self.num_pairs, self.seed, epoch, self.shuffle)
                batch.append((position, int(order[position % self.num_pairs])))
            yield batch
