"""Encoded images of any kind, read safely: bytes or a file to an 8-bit RGB image. Imports no torch."""

import io
import os
import stat
import warnings
from collections.abc import Mapping

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")  # none runs another program
MAX_PIXELS = 8192 * 8192
MAX_ASPECT = 16
MIN_SIDE = 16
MAX_FILE_BYTES = 256 * 2**20


class BadImage(ValueError):
    """These bytes cannot be used as an image; the message says why."""


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


def how_stored(data: bytes) -> tuple[str, bool, tuple[int, int]]:
    """How an image that decode_image reads is stored: RGB, CMYK, ... ("animated" where only its first frame is used),
    whether it is laid over white, and its width and height."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        transparent = _transparent(image)
        return "animated" if getattr(image, "n_frames", 1) > 1 else image.mode, transparent, image.size


def _transparent(image: Image.Image) -> bool:
    return not image.mode.startswith("I") and (image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info)


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
    if _transparent(image):
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
