"""Oracle: whether a drawing of the shapes world is what its caption asks for, and how clean (shapes/oracle.py)."""

import torch
from PIL import Image

from eval.metrics.base import Metric
from shapes.oracle import judge


class Oracle(Metric):
    """In [0, 1]: half for shape, colour, background and position being right, half for cleanliness. It needs no
    weights and judges captions of drawings only: any other prompt raises UserError."""

    def score(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        return torch.tensor([judge(image, prompt).score for image, prompt in zip(images, prompts, strict=True)])
