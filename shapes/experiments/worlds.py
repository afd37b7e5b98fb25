"""A world: a base, pairs from one source, and the captions that are drawn and judged. Made once, as files."""

import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from common.train_options import TrainOptions
from shapes.experiment import cache_pairs, draw_and_judge, run_options
from shapes.experiments.plan import Settings, World
from shapes.mixture import RESOLUTION, sample_captions
from shapes.pairs import write_pairs
from shapes.pipeline import base_pipeline, open_base
from shapes.preferences import write_preferences

DRAWN_SHARE = {"on-policy": 1.0, "mixed": 0.5}  # of the pairs, by the base itself
PARTS_OF_SCORE = ("shape", "colour", "background", "position", "cleanliness")
NOISE_SEED = 10_000_000  # of the first caption's drawing

opened = lru_cache(maxsize=1)(open_base)


def world_folder(world: World, settings: Settings) -> Path:
    return Path(settings.output, "worlds", world.name)


def options_on(world: World, settings: Settings, **options: Any) -> TrainOptions:
    """train.py's options on a world's cached pairs."""
    return run_options(base=world.base, pretrained_model_name_or_path=base_pipeline(kind=world.base), lora_rank=0,
                       cached_dataset=world_folder(world, settings) / "cache", train_batch_size=settings.batch_size, **options)


def make_world(world: World, settings: Settings) -> dict:
    """Draw the pairs and encode them; returns what the oracle says of the base's own drawings."""
    folder = world_folder(world, settings)
    if world.pairs == "off-policy":
        pairs = write_pairs(folder / "pairs", settings.pairs, seed=1, resolution=RESOLUTION)
    else:
        pairs = write_preferences(folder / "pairs", settings.pairs, 1, settings.inference_steps,
                                  drawn_share=DRAWN_SHARE[world.pairs])
    cache_pairs(options_on(world, settings, train_data_dir=pairs))
    return judged(world, settings)[0]


def captions(settings: Settings) -> list[str]:
    """Of drawings that no base was trained on."""
    return sample_captions(random.Random("judged"), settings.captions, unseen=True)


def judged(world: World, settings: Settings, network: nn.Module | None = None) -> tuple[dict[str, Any], np.ndarray]:
    """What the oracle says of the captions as drawn by the network (None: the base's), from fixed noise; and the images."""
    images, judgements = draw_and_judge(network, opened(world.base), captions(settings), NOISE_SEED, settings.inference_steps)
    record = {name: float(np.mean([getattr(judgement, name) for judgement in judgements])) for name in PARTS_OF_SCORE}
    return record | {"scores": [judgement.score for judgement in judgements]}, images
