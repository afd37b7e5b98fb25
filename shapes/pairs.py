"""Preference pairs of drawn shapes, in the columns of Pick-a-Pic.

    python -m shapes.pairs --output output/pairs --num_pairs 1000 --seed 0

The winner is a clean drawing of the caption, the loser a flawed or a wrong one. As in Pick-a-Pic the two come in
either order, some pairs are undecided (label_0 is 0.5) and the models have names, some of which contain "dream".
"""

import io
import os
import random
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from common.errors import UserError, run_program
from common.options import option, parse
from shapes.drawing import (FLAW_NAMES, Drawing, caption, random_drawing, random_flaws, render, wrong_colour,
                            wrong_shape)

MODELS = ("shapes/dreamlike-drawer-1.0", "shapes/dreamlike-drawer-2.0", "shapes/plain-drawer-1.5")
UNDECIDED_SHARE = 0.1
ROWS_PER_FILE = 10_000
LOSERS = (*FLAW_NAMES, "wrong colour", "wrong shape")


@dataclass
class PairsOptions:
    output: str = option("output/pairs", "folder for the parquet files")
    num_pairs: int = option(1000, "how many", at_least=1)
    seed: int = option(0, "of all that is drawn", at_least=0)
    resolution: int = option(64, "pixels a side", at_least=8)


def draw_loser(drawing: Drawing, kind: str, rng: random.Random, resolution: int) -> Image.Image:
    """A flawed or wrong drawing; `kind` is one of LOSERS."""
    if kind == "wrong colour":
        return render(wrong_colour(drawing, rng), resolution)
    if kind == "wrong shape":
        return render(wrong_shape(drawing, rng), resolution)
    return render(drawing, resolution, random_flaws(rng, kind))


def jpeg_bytes(image: Image.Image, quality: int = 95) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def pair_row(text: str, winner: Image.Image, loser: Image.Image, rng: random.Random, undecided: bool = False) -> dict:
    """One row of the data set. The winner is image 0 or image 1 with equal probability."""
    images, label = [winner, loser], 1.0
    if rng.random() < 0.5:
        images, label = [loser, winner], 0.0
    return {"caption": text, "jpg_0": jpeg_bytes(images[0]), "jpg_1": jpeg_bytes(images[1]),
            "label_0": 0.5 if undecided else label, "model_0": rng.choice(MODELS), "model_1": rng.choice(MODELS)}


def write_rows(folder: str | os.PathLike, rows: list[dict], split: str = "train") -> Path:
    """Write rows as `folder`/SPLIT-00000.parquet, SPLIT-00001.parquet, ...; returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{split}-*.parquet"):
        old.unlink()
    schema = pa.schema([("caption", pa.string()), ("jpg_0", pa.binary()), ("jpg_1", pa.binary()),
                        ("label_0", pa.float64()), ("model_0", pa.string()), ("model_1", pa.string())])
    for index, start in enumerate(range(0, len(rows), ROWS_PER_FILE)):
        table = pa.Table.from_pylist(rows[start:start + ROWS_PER_FILE], schema=schema)
        pq.write_table(table, folder / f"{split}-{index:05d}.parquet")
    return folder


def write_pairs(folder: str | os.PathLike, num_pairs: int, seed: int = 0, resolution: int = 64) -> Path:
    """Draw `num_pairs` pairs into parquet files in `folder` and return it as a Path.

    Columns: caption, jpg_0 and jpg_1 (JPEG bytes), label_0 (1: image 0 wins, 0: image 1 wins, 0.5: undecided),
    model_0, model_1. The same arguments give the same bytes. Raises UserError where num_pairs is not positive.
    """
    if num_pairs < 1:
        raise UserError(f"num_pairs is {num_pairs}: ask for at least one pair")
    rng = random.Random(seed)
    rows = []
    for index in range(num_pairs):
        drawing = random_drawing(rng)
        loser = draw_loser(drawing, LOSERS[index % len(LOSERS)], rng, resolution)
        undecided = rng.random() < UNDECIDED_SHARE
        rows.append(pair_row(caption(drawing), render(drawing, resolution), loser, rng, undecided))
    return write_rows(folder, rows)


def main() -> None:
    [options], _ = parse([PairsOptions], program="python -m shapes.pairs", description=__doc__)
    folder = write_pairs(options.output, options.num_pairs, options.seed, options.resolution)
    print(f"{options.num_pairs} pairs in {folder}")


if __name__ == "__main__":
    run_program(main)
