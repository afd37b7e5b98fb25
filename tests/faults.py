"""A dataset of preference pairs with every fault that the docs name, and what should come of each."""

import functools
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from shapes.pairs import write_pairs

USED, REPLACED, DROPPED = "used", "replaced", "dropped"


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(mode: str = "RGB", size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A gradient that differs from every drawing."""
    ramp = np.linspace(0, 255, size[0] * size[1] * 3).reshape(size[1], size[0], 3).astype(np.uint8)
    return Image.fromarray(ramp).convert(mode)


@functools.cache
def bomb(side: int) -> bytes:
    """A black PNG of one bit a pixel, made without its pixels."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compress(bytes(side * (1 + side // 8)), 1)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)) + chunk(b"IDAT", rows)
            + chunk(b"IEND", b""))


def image_faults(jpeg: bytes) -> dict[str, tuple[object, str]]:
    """Name -> (a cell of jpg_0, its outcome). `jpeg` is a good image to be damaged."""
    sixteen_bit = Image.fromarray(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16))
    frames = [picture().rotate(angle) for angle in (0, 90)]
    return {
        "truncated": (jpeg[:len(jpeg) // 2], REPLACED),
        "cut in the header": (jpeg[:20], REPLACED),
        "zero bytes": (b"", REPLACED),
        "None": (None, REPLACED),
        "noise": (bytes(range(256)) * 8, REPLACED),
        "text": (b"<html>404 not found</html>", REPLACED),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nshowpage\n", REPLACED),
        "1x1": (encoded(picture(size=(1, 1)), "PNG"), REPLACED),
        "20000x20000": (bomb(20000), REPLACED),
        "long strip": (encoded(picture(size=(4000, 20)), "JPEG"), REPLACED),
        "CMYK": (encoded(picture("CMYK"), "JPEG"), USED),
        "palette": (encoded(picture("P"), "PNG"), USED),
        "gray": (encoded(picture("L"), "JPEG"), USED),
        "RGBA": (encoded(picture("RGBA"), "PNG"), USED),
        "gray with alpha": (encoded(picture("LA"), "PNG"), USED),
        "16 bit": (encoded(sixteen_bit, "PNG"), USED),
        "1 bit": (encoded(picture("1"), "PNG"), USED),
        "animated GIF": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), USED),
        "animated WebP": (encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]), USED),
    }


def write_faulty_pairs(folder: Path, num_good: int = 40) -> dict[str, tuple[int, str]]:
    """Write the parquet file; returns name of the fault -> (row, outcome). Rows without a fault are good ones."""
    write_pairs(folder / "good", num_good + 40, seed=3)
    rows = [row for row in pq.read_table(next((folder / "good").glob("*.parquet"))).to_pylist() if row["label_0"] != 0.5]
    planted: dict[str, tuple[int, str]] = {}
    rows, spare = rows[:num_good], rows[num_good:]

    def plant(name: str, outcome: str, **cells) -> None:
        row = spare.pop() | cells
        place = 2 * len(planted) + 1  # among the good ones
        rows.insert(place, row)
        planted[name] = place, outcome

    for name, (cell, outcome) in image_faults(spare[0]["jpg_0"]).items():
        # In the loser's column and in the winner's, in turn.
        plant(name, outcome, **{f"jpg_{len(planted) % 2}": cell})
    plant("identical images", REPLACED, jpg_0=spare[0]["jpg_0"], jpg_1=spare[0]["jpg_0"])
    plant("empty caption", USED, caption="")
    plant("missing caption", USED, caption=None)
    plant("10,000 words", USED, caption="a red circle " * 3334)
    plant("lone surrogate", REPLACED, caption="LONE")
    plant("duplicate", USED, **rows[0])
    plant("undecided", DROPPED, label_0=0.5)
    plant("no label", DROPPED, label_0=None)
    plant("label is not a number", DROPPED, label_0=float("nan"))

    columns = {name: pa.array([row[name] for row in rows]) for name in rows[0] if name != "caption"}
    captions = [None if row["caption"] is None else row["caption"].encode() for row in rows]
    captions[planted["lone surrogate"][0]] = b"a red \xed\xa0\x80 circle"  # U+D800 as some programs write it
    binary = pa.array(captions, pa.binary())
    columns["caption"] = pa.Array.from_buffers(pa.string(), len(binary), binary.buffers(), binary.null_count)
    (folder / "faulty").mkdir(parents=True)
    pq.write_table(pa.table(columns), folder / "faulty" / "train-00000.parquet")
    return planted
