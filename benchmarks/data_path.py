"""How many pairs a second one CPU core can feed, from JPEGs and from a cache, and how many 64 GPUs would eat.

    python -m benchmarks.data_path [--pairs_per_gpu 20]

CPU time of this process, so that a busy machine does not change it; files are in the page cache. The decoders that could
replace Pillow are timed as well, and compared with it bit by bit.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import run_program
from common.options import option, parse

if TYPE_CHECKING:
    from datasets import Dataset

    from data.cached import CachedDataset


@dataclass
class DataPathOptions:
    pairs: int = option(32, "pairs that are read, three times; the best time counts", at_least=1)
    pairs_per_gpu: float = option(20.0, "pairs a second of one GPU, for the rate 64 of them need", above=0)
    gpus: int = option(64, "GPUs to feed", at_least=1)
    cores_per_gpu: int = option(16, "CPU cores beside each GPU", at_least=1)


def milliseconds(function: Callable[[int], object], count: int) -> float:
    """CPU time of a call, the best of three rounds over 0 .. count-1."""
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        for number in range(count):
            function(number)
        best = min(best, time.process_time() - start)
    return best / count * 1000


def random_cache(folder: Path, table: "Dataset", latent_shape: tuple, widths: dict[str, tuple]) -> "CachedDataset":
    """A cache of random numbers in the real layout."""
    import torch

    from data.cached import CachedDataset, with_checks
    from data.encode import save_rows, write_shard
    channels, *side = latent_shape
    prompts = ["", *table["caption"]]
    shards = {
        "pairs-00000.safetensors": with_checks(
            {"moments": torch.randn(len(table), 2, 2, 2 * channels, *side).bfloat16()}, dims=3),
        "prompts-00000.safetensors": with_checks(
            {name: torch.randn(len(prompts), *shape).bfloat16() for name, shape in widths.items()}, dims=1)}
    for name, tensors in shards.items():
        write_shard(folder / name, tensors)
    save_rows(table, ["jpg_0", "jpg_1"], folder / "rows")
    texts = {"settings.json": {}, "prompts.json": prompts, "manifest.json": {
        "shards": {name: (folder / name).stat().st_size for name in shards}, "files": {}, "faults": {}, "pairs_per_shard": len(table),
        "prompts_per_shard": len(prompts)}}
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content))
    return CachedDataset(folder)


def measure(side: int, model: str, options: DataPathOptions) -> list[tuple[str, float]]:
    """(what, milliseconds) for a pair of JPEGs of `side` pixels, and for the cached pair of that model."""
    import torch
    import torchvision

    from benchmarks.models import UNETS, make_family
    from benchmarks.step import make_pairs, step_options
    from common.images import decode_image
    from data.choosing import choose_pairs
    from data.draws import draw_pair
    from data.images import cut_square, scale_pixels
    from data.pairs import PairDataset
    table = make_pairs(options.pairs, side)
    train = step_options(model, 1, 1, "no").data
    family = make_family(model)
    latent_shape = family.latent_shape(side, side)
    pairs = choose_pairs(table, train, 0)
    data = PairDataset(pairs, train, 0, latent_shape, family.tokenize)
    jpegs, captions = table["jpg_0"][:], table["caption"][:]
    images = [decode_image(data) for data in jpegs]
    encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in jpegs]
    double = make_pairs(4, 2 * side)["jpg_0"][:]
    rows = [
        ("a pair from JPEGs", milliseconds(lambda i: data[i, i], options.pairs)),
        ("  draws (noise, flips, ...)", milliseconds(lambda i: draw_pair(0, i, latent_shape), options.pairs)),
        ("  decoding, Pillow, 2 images", 2 * milliseconds(lambda i: decode_image(jpegs[i]), options.pairs)),
        ("  cutting, 2 images", 2 * milliseconds(lambda i: cut_square(images[i], side), options.pairs)),
        ("  tokenizing", milliseconds(lambda i: family.tokenize(captions[i:i + 1]), options.pairs)),
        ("  (not done: scaling to float32, 2 images)", 2 * milliseconds(
            lambda i: scale_pixels(cut_square(images[i], side)), options.pairs)),
        ("  (not used: torchvision's decoder, 2 images)", 2 * milliseconds(
            lambda i: torchvision.io.decode_jpeg(encoded[i]), options.pairs)),
        (f"  from {2 * side} pixels: decoding and cutting, 2 images", 2 * milliseconds(
            lambda i: cut_square(decode_image(double[i]), side), len(double))),
    ]
    same = all(torch.equal(torchvision.io.decode_jpeg(e), cut_square(image, side)) for e, image in zip(encoded, images))
    print(f"{side} px: torchvision decodes to {'the same' if same else 'other'} pixels as Pillow")
    widths = {"embeddings": (77, UNETS[model]["cross_attention_dim"])} | ({"pooled": (1280,)} if model == "sdxl" else {})
    with tempfile.TemporaryDirectory() as folder:
        cache = random_cache(Path(folder), table, latent_shape, widths)
        cached = PairDataset(choose_pairs(cache.rows(), train, 0), train, 0, latent_shape, family.tokenize, cache)
        rows.append(("a pair from a cache", milliseconds(lambda i: cached[i, i], options.pairs)))
        moved, cached_moved = (sum(t.nbytes for t in source[0, 0].values()) / 2**20 for source in (data, cached))
        print(f"{side} px: a pair moves {moved:.2f} MiB to the device, cached {cached_moved:.2f} MiB; the cache keeps "
              f"{(cache.folder / 'pairs-00000.safetensors').stat().st_size / len(table) / 2**20:.2f} MiB a pair")
    return rows


def main() -> None:
    [options], _ = parse([DataPathOptions], program="python -m benchmarks.data_path", description=__doc__)
    import datasets
    import torch
    torch.set_num_threads(1)
    datasets.disable_progress_bar()
    need = options.gpus * options.pairs_per_gpu
    for side, model in ((512, "sd15"), (1024, "sdxl")):
        rows = measure(side, model, options)
        print(f"\n| {model}, {side} px | CPU ms | pairs/s a core | cores for {options.gpus} GPUs at "
              f"{options.pairs_per_gpu:g} pairs/s each |\n|---|---:|---:|---:|")
        for name, spent in rows:
            cores = f"{1000 / spent:.0f} | {need * spent / 1000:.1f} of {options.gpus * options.cores_per_gpu} |"
            print(f"| {name.strip()} | {spent:.2f} | " + (" | |" if name.startswith(" ") else cores))
        print()


if __name__ == "__main__":
    run_program(main)
