"""What a row of preference pairs must be to be used, and how many that cannot be are too many.

A pair that cannot be used has a column and a reason, and is skipped.

Used as they are: empty or missing captions (the empty prompt), captions of any length (cut to the tokenizer's 77
tokens), duplicate pairs, and images of every mode and format that common.images reads.
"""

import math

import datasets
from PIL import Image

from common.images import BadImage, decode_image, image_bytes


class BadPair(ValueError):
    """This row cannot be used as a training pair."""

    def __init__(self, column: str, reason: str):
        super().__init__(f"{column}: {reason}")
        self.column, self.reason = column, reason


def allowed_bad_pairs(seen: int, fraction: float) -> float:
    """How many of `seen` pairs may be bad: the fraction of them, and three standard deviations of that count more, so
    that a run is not stopped by an unlucky beginning. 0 for a fraction of 0; every pair for a fraction of 1.
    """
    if fraction in (0.0, 1.0):
        return fraction * seen
    return max(1.0, fraction * seen + 3.0 * math.sqrt(fraction * seen))


def read_row(table: datasets.Dataset, number: int) -> dict:
    """A row's cells. Raises BadPair."""
    try:
        return table[number]
    except UnicodeDecodeError as error:
        raise BadPair("row", f"holds text that is not UTF-8 ({error.reason})") from None
    except (OSError, ValueError) as error:  # arrow's own errors are of these kinds
        raise BadPair("row", f"cannot be read ({type(error).__name__}: {error})") from None


def read_caption(row: dict, column: str) -> str:
    """The caption; "" where there is none. Raises BadPair."""
    caption = row[column]
    if caption is None:
        return ""
    if not isinstance(caption, str):
        raise BadPair(column, f"not text but {type(caption).__name__}")
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError:
        raise BadPair(column, "holds a lone surrogate, which is no character") from None
    return caption


def decode_images(row: dict, columns: list[str]) -> list[Image.Image]:
    """The RGB images of the given columns. Raises BadPair where one cannot be used, or two are the same file."""
    encoded = [_of_column(column, image_bytes, row[column]) for column in columns]
    if len(encoded) == 2 and encoded[0] == encoded[1]:
        raise BadPair(", ".join(sorted(columns)), "the same image twice: there is nothing to prefer")
    return [_of_column(column, decode_image, data) for column, data in zip(columns, encoded)]


def _of_column(column: str, read, value):
    try:
        return read(value)
    except BadImage as error:
        raise BadPair(column, str(error)) from None


def usable_captions(captions) -> list[str]:
    """Those that a pair can be used with, as read_caption gives them."""
    usable = []
    for caption in captions:
        try:
            usable.append(read_caption({"caption": caption}, "caption"))
        except BadPair:
            continue
    return usable
