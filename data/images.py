"""From image bytes to the VAE's input, whatever the bytes are."""

import io
import os
import stat
import warnings
from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")  # none runs another program
MAX_PIXELS = 8192 * 8192
MAX_ASPECT = 16
MIN_SIDE = 16
MAX_FILE_BYTES = 256 * 2**20


class BadImage(ValueError):
    """These bytes cannot be used as a training image; the message says why."""


def image_bytes(value) -> bytes:
    """The encoded image of a dataset cell: bytes, or datasets' {"bytes", "path"}. Raises BadImage."""
    if isinstance(value, Mapping):
        if value.get("bytes") is None and value.get("path"):
            return _read_file(value["path"])
        value = value.get("bytes")
    if value is None:
        raise BadImage("no image")
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise BadImage(f"not image bytes but {type(value).__name__}")
    if len(value) == 0:
        raise BadImage("empty image")
    return bytes(value)


def _read_file(path: str) -> bytes:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device might never end
            raise BadImage(f"{path} is not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise BadImage(f"{path} has {status.st_size} bytes, more than {MAX_FILE_BYTES}")
        with open(path, "rb") as file:
            return file.read()
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, BadImage):
            raise
        raise BadImage(f"cannot read {path!r}: {getattr(error, 'strerror', None) or error}") from None


def decode_image(data: bytes) -> Image.Image:
    """Encoded bytes -> RGB image; of an animation the first frame, of 16-bit gray its upper 8 bits, transparency over
    white. Raises BadImage with the reason; what is too large is refused by its header, before it is decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on metadata, and on bombs below its own limit
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_size(*image.size)
                return to_rgb(image)
    except BadImage:
        raise
    except MemoryError:
        raise BadImage("too large for this machine's memory") from None
    except Image.DecompressionBombError:
        raise BadImage(f"more than {MAX_PIXELS // 10**6} megapixels") from None
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them stumble over
        reason = "not an image, or damaged in its header" if isinstance(error, Image.UnidentifiedImageError) else error
        raise BadImage(f"{reason}" if str(reason) else type(error).__name__) from None


def mode_and_size(data: bytes) -> tuple[str, tuple[int, int]]:
    """How an image that decode_image reads is stored: RGB, CMYK, ... ("animated" where only its first frame is used), and
    its width and height."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return "animated" if getattr(image, "n_frames", 1) > 1 else image.mode, image.size


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width}x{height} is more than {MAX_PIXELS // 10**6} megapixels")
    if min(width, height) < MIN_SIDE:
        raise BadImage(f"{width}x{height} is too small, a side needs {MIN_SIDE} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(f"{width}x{height} is more than {MAX_ASPECT} times longer than wide")


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an opened image; transparency is laid over white, as a viewer shows it."""
    if image.mode.startswith("I"):  # Pillow's own conversion clips 16-bit values at 255, which makes them white
        gray = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray((gray >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


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


def to_pixels(image: Image.Image, resolution: int, crop: Tensor | None = None, flip: bool = False) -> Tensor:
    """RGB image -> (3, resolution, resolution) in [-1, 1]: cut_square, scaled."""
    return scale_pixels(cut_square(image, resolution, crop, flip))
