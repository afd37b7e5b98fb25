"""Encode a run's images and prompts once: train.py --cached_dataset DIR then needs neither VAE nor text encoder.

    accelerate launch -m data.cache --config configs/train/sd15_diffusion_dpo.yaml --cached_dataset DIR

takes train.py's own flags, so that what is cached is what that command would train on. All rows of the split are
cached, decided or not: which of them are used, and who wins, is settled when training, from the same columns.

    DIR/settings.json                models (by digest or hub commit), data, resolution, transform; other runs are refused
    DIR/rows/                        the table without its images
    DIR/prompts.json                 the distinct prompts, the empty one first
    DIR/prompts-NNNNN.safetensors    what the family makes of a prompt: embeddings (n, L, D), ...
    DIR/pairs-NNNNN.safetensors      moments (n, images, flips, 2C, h, w): the VAE's mean and log-variance
    DIR/manifest.json                written last: sizes and digests, and the rows that cannot be used
"""

from dataclasses import dataclass

from common.errors import UserError, quiet_libraries, run_program
from common.options import option
from common.train_checks import parse_options
from common.train_options import TrainOptions


@dataclass
class CacheOptions:
    title = "the cache"

    pairs_per_shard: int = option(1024, "pairs per file (SD1.5: 0.27 MB a pair, SDXL: 1 MB)", at_least=1)
    encode_batch_size: int | None = option(
        None, "pairs, or prompts, that a device encodes at a time; of SD1.5 and SDXL another one than the training's "
        "changes last bits", at_least=1, default_text="--train_batch_size")


def cache(options: TrainOptions, own: CacheOptions) -> None:
    """Open the base, start the devices and encode. Raises UserError."""
    from models.family import open_family
    family = open_family(options.model)
    from data.encode import make_cache
    from models.devices import settle_precision, start_accelerator
    settle_precision(options, family)
    options.data.resolution = options.data.resolution or family.training_resolution
    make_cache(options, family, start_accelerator(options), own.pairs_per_shard, own.encode_batch_size)


def main() -> None:
    options = parse_options(None, CacheOptions, program="python -m data.cache", description=__doc__)
    if not options.data.cached_dataset:
        raise UserError("name the folder that the cache is written to: --cached_dataset DIR")
    if options.data.source is None:
        raise UserError("name the pairs to cache: --dataset_name (hub id, folder or parquet) or --train_data_dir")
    quiet_libraries()
    cache(options, *options.more)


if __name__ == "__main__":
    run_program(main)
