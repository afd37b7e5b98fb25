"""Drawn shapes: captions, the drawings they describe, and the flaws a drawing can have.

    >>> drawing = parse("a small red circle at the top left on a blue background")
    >>> caption(drawing)
    'a small red circle at the top left on a blue background'
    >>> render(drawing, 64)                                  # a clean PIL image
    >>> render(drawing, 64, Flaws(blur=0.5))                 # the same, blurred
"""

import math
import random
import re
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw, ImageFilter

COLOURS = {
    "red": (220, 30, 35), "orange": (250, 140, 20), "yellow": (250, 225, 50), "green": (35, 150, 60),
    "blue": (40, 80, 215), "purple": (140, 50, 170), "black": (20, 20, 20), "white": (245, 245, 245),
}
KINDS = ("circle", "square", "triangle", "cross")
SIZES = {"small": 0.14, "medium": 0.19, "large": 0.28}  # radius of the circle of equal area, as a share of the side
POSITIONS = {  # centre of the shape as a share of the side; "centre" is what a caption without a position means
    "centre": (0.5, 0.5), "at the top left": (0.3, 0.3), "at the top right": (0.7, 0.3),
    "at the bottom left": (0.3, 0.7), "at the bottom right": (0.7, 0.7),
    "on the left": (0.27, 0.5), "on the right": (0.73, 0.5),
}
CORNERS = tuple(position for position in POSITIONS if position.startswith("at "))

_SUPERSAMPLING = 4
_ARTICLE = {word: "an" if word[0] in "aeiou" else "a" for word in (*COLOURS, *SIZES)}
_SHAPE = re.compile(
    rf"an? (?:(?P<size>{'|'.join(SIZES)}) )?(?P<colour>{'|'.join(COLOURS)}) (?P<kind>{'|'.join(KINDS)})"
    rf"(?: (?P<position>{'|'.join(p for p in POSITIONS if p != 'centre')}))?"
)
_BACKGROUND = re.compile(rf"on an? (?P<colour>{'|'.join(COLOURS)}) background")


@dataclass(frozen=True)
class Shape:
    kind: str
    colour: str
    size: str = "medium"
    position: str = "centre"


@dataclass(frozen=True)
class Drawing:
    shapes: tuple[Shape, ...]
    background: str


@dataclass(frozen=True)
class Flaws:
    """How badly a drawing is made. Every strength lies in [0, 1]; 0 is clean.

    blur: Gaussian blur, its radius up to 8% of the side. shift_x, shift_y (in [-1, 1]): off-centre by up to 20% of
    the side. tint: the whole image is blended towards `tint_colour` by up to 60%. ragged: the outline goes in and out
    by up to 45% of the radius; `seed` draws its teeth.
    """
    blur: float = 0.0
    shift_x: float = 0.0
    shift_y: float = 0.0
    tint: float = 0.0
    ragged: float = 0.0
    tint_colour: tuple[int, int, int] = (128, 128, 128)
    seed: int = 0


FLAW_NAMES = ("blurred", "off-centre", "tinted", "ragged")


def caption(drawing: Drawing) -> str:
    """The caption of a drawing; parse() reads it back."""
    shapes = []
    for shape in drawing.shapes:
        words = [shape.size] if shape.size != "medium" else []
        words += [shape.colour, shape.kind]
        words += [shape.position] if shape.position != "centre" else []
        shapes.append(f"{_ARTICLE[words[0]]} {' '.join(words)}")
    return f"{' and '.join(shapes)} on {_ARTICLE[drawing.background]} {drawing.background} background"


def parse(text: str) -> Drawing:
    """The drawing that a caption describes. Raises ValueError where the text is no caption of a drawing."""
    text = " ".join(text.lower().split())
    head, on, tail = text.rpartition(" on a")
    background = _BACKGROUND.fullmatch(f"{on}{tail}".strip())
    shapes = [_SHAPE.fullmatch(part) for part in head.split(" and ")]
    if background is None or None in shapes:
        raise ValueError(f"no caption of a drawing: {text!r} (such as: a red circle on a blue background)")
    given = [{key: value for key, value in match.groupdict().items() if value} for match in shapes]
    return Drawing(tuple(Shape(**attributes) for attributes in given), background["colour"])


def outline(kind: str, radius: float) -> list[tuple[float, float]]:
    """Corner points, around (0, 0), of a shape whose area is that of a circle of `radius`."""
    if kind == "circle":
        points = _ring(64)
    elif kind == "square":
        points = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    elif kind == "triangle":
        points = _ring(3)
    elif kind == "cross":
        points = [(-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1),
                  (-1, -1)]
    else:
        raise ValueError(f"unknown shape {kind!r}: one of {', '.join(KINDS)}")
    scale = radius * math.sqrt(math.pi / _area(points))
    return [(x * scale, y * scale) for x, y in points]


def render(drawing: Drawing, resolution: int = 64, flaws: Flaws = Flaws()) -> Image.Image:
    """Draw in RGB at `resolution` pixels a side, antialiased."""
    side = resolution * _SUPERSAMPLING
    image = Image.new("RGB", (side, side), COLOURS[drawing.background])
    canvas = ImageDraw.Draw(image)
    teeth = random.Random(flaws.seed)
    for shape in drawing.shapes:
        x, y = POSITIONS[shape.position]
        x, y = x + 0.2 * flaws.shift_x, y + 0.2 * flaws.shift_y
        points = outline(shape.kind, SIZES[shape.size])
        if flaws.ragged:
            points = [(px * (scale := 1 + 0.45 * flaws.ragged * teeth.uniform(-1, 1)), py * scale)
                      for px, py in _subdivided(points, 24)]
        canvas.polygon([((x + px) * side, (y + py) * side) for px, py in points], fill=COLOURS[shape.colour])
    image = image.reduce(_SUPERSAMPLING)
    if flaws.blur:
        image = image.filter(ImageFilter.GaussianBlur(0.08 * flaws.blur * resolution))
    if flaws.tint:
        image = Image.blend(image, Image.new("RGB", image.size, flaws.tint_colour), 0.6 * flaws.tint)
    return image


def random_drawing(rng: random.Random, several: float = 0.15) -> Drawing:
    """A drawing of one shape, or with probability `several` of two side by side."""
    background, *colours = rng.sample(sorted(COLOURS), 3)
    if rng.random() < several:
        return Drawing(tuple(Shape(rng.choice(KINDS), colour, rng.choice(("small", "medium")), position)
                             for colour, position in zip(colours, ("on the left", "on the right"))), background)
    position = rng.choice(CORNERS) if rng.random() < 0.5 else "centre"
    size = rng.choice(tuple(SIZES) if position == "centre" else ("small", "medium"))
    return Drawing((Shape(rng.choice(KINDS), colours[0], size, position),), background)


def random_flaws(rng: random.Random, name: str, low: float = 0.3, high: float = 1.0) -> Flaws:
    """One flaw of FLAW_NAMES with a strength drawn from [low, high]."""
    strength = rng.uniform(low, high)
    if name == "blurred":
        return Flaws(blur=strength)
    if name == "off-centre":
        angle = rng.uniform(0, 2 * math.pi)
        return Flaws(shift_x=strength * math.cos(angle), shift_y=strength * math.sin(angle))
    if name == "tinted":
        return Flaws(tint=strength, tint_colour=rng.choice(sorted(COLOURS.values())))
    if name == "ragged":
        return Flaws(ragged=strength, seed=rng.randrange(2**31))
    raise ValueError(f"unknown flaw {name!r}: one of {', '.join(FLAW_NAMES)}")


def wrong_shape(drawing: Drawing, rng: random.Random) -> Drawing:
    """The drawing with the kind of one of its shapes replaced by another."""
    return _with_one_other(drawing, rng, kind=lambda shape: [kind for kind in KINDS if kind != shape.kind])


def wrong_colour(drawing: Drawing, rng: random.Random) -> Drawing:
    """The drawing with the colour of one of its shapes replaced by another that the drawing does not use."""
    used = {shape.colour for shape in drawing.shapes} | {drawing.background}
    return _with_one_other(drawing, rng, colour=lambda shape: [colour for colour in COLOURS if colour not in used])


def _with_one_other(drawing, rng, **choices):
    (name, others), = choices.items()
    index = rng.randrange(len(drawing.shapes))
    shapes = list(drawing.shapes)
    shapes[index] = replace(shapes[index], **{name: rng.choice(others(shapes[index]))})
    return replace(drawing, shapes=tuple(shapes))


def _ring(count):
    """`count` points at equal angles around the unit circle, the first one on top."""
    angles = [2 * math.pi * index / count - math.pi / 2 for index in range(count)]
    return [(math.cos(angle), math.sin(angle)) for angle in angles]


def _subdivided(points, count):
    """About `count` points along the outline, its corners among them."""
    steps = max(1, count // len(points))
    return [(x + (x2 - x) * step / steps, y + (y2 - y) * step / steps)
            for (x, y), (x2, y2) in zip(points, points[1:] + points[:1]) for step in range(steps)]


def _area(points):
    return abs(sum(x * y2 - x2 * y for (x, y), (x2, y2) in zip(points, points[1:] + points[:1]))) / 2
