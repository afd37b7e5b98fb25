"""From an RGB image to the VAE's input."""

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F

CUT = "short side bilinear, centre crop, [-1, 1]"  # what cut_square does without `crop`, in words: a cache is bound to it


def cut_square(image: Image.Image, resolution: int, crop: Tensor | None = None, flip: bool = False) -> Tensor:
    """RGB image -> (3, resolution, resolution) uint8: a quarter of the bytes to move of what scale_pixels makes of it.

    The short side is resized (bilinear), then a square is cut: in the centre, or at `crop`, (2,) top and left as
    fractions in [0, 1) of the room there is; then it is flipped left to right or not.
    """
    image = F.resize(image, resolution, interpolation=F.InterpolationMode.BILINEAR)
    if crop is None:
        image = F.center_crop(image, [resolution, resolution])
    else:
        top = int(float(crop[0]) * (image.height - resolution + 1))
        left = int(float(crop[1]) * (image.width - resolution + 1))
        image = F.crop(image, top, left, resolution, resolution)
    if flip:
        image = F.hflip(image)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(resolution, resolution, 3)
    return pixels.permute(2, 0, 1)


def scale_pixels(pixels: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1], the VAE's input."""
    return pixels.float() / 127.5 - 1.0
