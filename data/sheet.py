"""Some pairs of a dataset as one picture, winner left and loser right, to see whether they were read as they are meant."""

import io
import os
import textwrap

from PIL import Image, ImageDraw, ImageOps

from common.files import write_bytes
from data.bad_pairs import BadPair, decode_images, read_caption, read_row
from data.choosing import PairTable

SIDE, GAP, LINE, CAPTION_LINES = 192, 8, 14, 2
PAIRS_IN_A_ROW = 3


def write_sheet(pairs: PairTable, path: str | os.PathLike, count: int, marks: dict[int, str]) -> int:
    """A PNG of `count` pairs, captions below them; returns how many could be read. Up to a third are pairs that are marked
    (index -> a word, shown in red), the others are spread evenly over the dataset."""
    tiles = []
    first = spread(sorted(marks), count // 3)
    others = [index for index in range(len(pairs)) if index not in first]
    for index in first + spread(others, count - len(first)):
        try:
            tiles.append(draw_pair(pairs, index, marks.get(index)))
        except BadPair:
            continue
    width, height = tiles[0].size if tiles else (SIDE, SIDE)
    in_a_row = min(PAIRS_IN_A_ROW, max(len(tiles), 1))
    rows = max(-(-len(tiles) // in_a_row), 1)
    sheet = Image.new("RGB", (in_a_row * (width + GAP) + GAP, rows * (height + GAP) + GAP), (236, 236, 236))
    for place, tile in enumerate(tiles):
        row, column = divmod(place, in_a_row)
        sheet.paste(tile, (GAP + column * (width + GAP), GAP + row * (height + GAP)))
    encoded = io.BytesIO()
    sheet.save(encoded, "PNG")
    write_bytes(path, encoded.getvalue())
    return len(tiles)


def spread(indices: list[int], count: int) -> list[int]:
    """At most `count` of them, evenly spaced."""
    return [indices[place] for place in sorted({place * len(indices) // count for place in range(count)})] if indices else []


def draw_pair(pairs: PairTable, index: int, mark: str | None = None) -> Image.Image:
    """One pair's tile, or a single image's. Raises BadPair."""
    row, wins = read_row(pairs.rows, int(pairs.index[index])), bool(pairs.first_wins[index])
    columns = pairs.image_columns if wins else pairs.image_columns[::-1]
    images = decode_images(row, columns)
    words = ["wins", "loses"] if pairs.paired else ["liked" if wins else "disliked"]
    tile = Image.new("RGB", (SIDE * len(images), LINE + SIDE + LINE * CAPTION_LINES + 4), "white")
    draw = ImageDraw.Draw(tile)
    for place, (image, column, word) in enumerate(zip(images, columns, words)):
        image.thumbnail((SIDE, SIDE))
        image = ImageOps.scale(image, SIDE // max(image.size), Image.Resampling.NEAREST)  # small ones are to be seen, too
        tile.paste(image, (place * SIDE + (SIDE - image.width) // 2, LINE + (SIDE - image.height) // 2))
        green = word in ("wins", "liked")
        draw.text((place * SIDE + 4, 1), f"{column} {word}"[:30], fill=(0, 110, 40) if green else (150, 30, 30))
    text = f"{int(pairs.index[index])}{f' ({mark})' * bool(mark)}: {read_caption(row, pairs.caption_column)}"
    for number, line in enumerate(textwrap.wrap(text, len(images) * 30)[:CAPTION_LINES]):
        printable = line.encode("latin-1", "replace").decode("latin-1")  # what Pillow's own font can draw
        draw.text((4, LINE + SIDE + 2 + number * LINE), printable, fill=(200, 0, 0) if mark else "black")
    return tile
