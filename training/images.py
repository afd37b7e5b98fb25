"""From image bytes to the VAE's input."""

import io
from collections.abc import Mapping

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F


class BadImage(ValueError):
    """These bytes cannot be used as a training image; the message says why."""


def image_bytes(value) -> bytes:
    """The encoded image of a dataset cell: bytes, or datasets' {"bytes", "path"}. Raises BadImage."""
    if isinstance(value, Mapping):
        if value.get("bytes") is None and value.get("path"):
            try:
                with open(value["path"], "rb") as file:
                    return file.read()
            except OSError as error:
                raise BadImage(f"cannot read {value['path']}: {error.strerror}") from None
        value = value.get("bytes")
    if value is None:
        raise BadImage("no image")
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise BadImage(f"not image bytes but {type(value).__name__}")
    if len(value) == 0:
        raise BadImage("empty image")
    return bytes(value)


def decode_image(data: bytes) -> Image.Image:
    """Encoded bytes -> RGB image. Raises BadImage with the reason."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise BadImage(f"{type(error).__name__}: {error}") from None


def to_pixels(image: Image.Image, resolution: int, crop: Tensor | None = None, flip: bool = False) -> Tensor:
    """RGB image -> (3, resolution, resolution) in [-1, 1].

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
    return pixels.permute(2, 0, 1).float() / 127.5 - 1.0
