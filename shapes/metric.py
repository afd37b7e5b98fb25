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


class OraclePart(Metric):
    """One part of the oracle's judgement, by its name: 1 where it is right and 0 where not, or the cleanliness in (0, 1].
    shapes/metrics.yaml names all five."""

    def __init__(self, device: str = "cpu", part: str = "cleanliness"):
        super().__init__(device)
        self.part = part

    def score(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        return torch.tensor([float(getattr(judge(image, prompt), self.part))
                             for image, prompt in zip(images, prompts, strict=True)])
