"""Small tables of pairs, red against blue."""

import io

import datasets
import torch
from PIL import Image

from common.train_checks import parse_options
from common.train_options import DataOptions
from data.pairs import PairDataset
from data.choosing import choose_pairs
from data.table import load_table


def jpeg(colour, size=(64, 64)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def table(labels, folder, **columns):
    rows = {"caption": [f"caption {n}" for n in range(len(labels))], "jpg_0": [jpeg("red")] * len(labels),
            "jpg_1": [jpeg("blue")] * len(labels), "label_0": labels, **columns}
    rows = {name: values for name, values in rows.items() if values is not None}
    path = folder / "pairs.parquet"
    datasets.Dataset.from_dict(rows).to_parquet(path)
    return path


def options(path, *flags) -> DataOptions:
    return parse_options(["--pretrained_model_name_or_path", "m", "--train_data_dir", str(path), "--resolution", "64", *flags]).data


def lengths(captions) -> dict[str, torch.Tensor]:
    """A family's tokenize() that keeps the caption readable."""
    return {"length": torch.tensor([[len(caption)] for caption in captions])}


def dataset_of(data: DataOptions, winners_only: bool = False) -> PairDataset:
    pairs = choose_pairs(load_table(data), data, 0, method="sft" if winners_only else "diffusion-dpo")
    return PairDataset(pairs, data, 0, (4, 8, 8), lengths, winners_only=winners_only)


def stripes(width, height):
    """Left half black, right half white."""
    image = Image.new("RGB", (width, height))
    image.paste((255, 255, 255), (width // 2, 0, width, height))
    return image
