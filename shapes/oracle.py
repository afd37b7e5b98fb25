"""The oracle: looks at an image and a caption and says what is right about the drawing and how clean it is.

It knows the palette, the outlines and the places of shapes.drawing and nothing of how an image was made. The image is
looked at in 32x32 pixels. A shape's colour is compared with the palette; its outline is matched, by cross-correlation,
with every kind of shape in eight sizes at every place. shapes/metric.py puts it among the metrics.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw

from shapes.drawing import COLOURS, KINDS, POSITIONS, Drawing, outline, parse, render
from common.errors import UserError

VIEW = 32
_RADII = np.geomspace(0.10, 0.32, 8)  # as a share of the side; SIZES lie between
_SOFTNESS = 0.5  # standard deviation, in pixels, of the outlines' blur: generated edges are never quite sharp
_LEAST_CONTRAST = 0.08  # of the distance from black to white: less is no shape
_LEAST_MATCH = 0.5  # share of a shape's energy that its best outline must explain


@dataclass(frozen=True)
class Judgement:
    """What the oracle sees. The four attributes are right or not, of every shape the caption asks for; cleanliness in
    (0, 1] is 1 / (1 + e), with e the mean absolute difference from the ideal drawing of the caption over the mean
    absolute contrast of its shapes: blur, shift, tint, ragged edges and a wrong size all lower it."""

    shape: bool
    colour: bool
    background: bool
    position: bool
    cleanliness: float

    @property
    def all_right(self) -> bool:
        return self.shape and self.colour and self.background and self.position

    @property
    def score(self) -> float:
        """In [0, 1]: the mean of the share of attributes that are right and of the cleanliness."""
        return 0.5 * (self.shape + self.colour + self.background + self.position) / 4 + 0.5 * self.cleanliness


def judge(image: Image.Image, prompt: str) -> Judgement:
    """Judge one image of any size against the caption of a drawing. Raises UserError for any other prompt."""
    try:
        asked = parse(prompt)
    except ValueError as error:
        raise UserError(f"the oracle judges drawings only: {error}") from None
    pixels = _view(image)
    background = np.median(_border(pixels), axis=0)
    regions = _split(pixels, background) if len(asked.shapes) == 2 else [np.ones((VIEW, VIEW), bool)]
    seen = [_read_shape(pixels, background, region) for region in regions]
    return Judgement(
        shape=all(kind == shape.kind for (kind, _, _), shape in zip(seen, asked.shapes)),
        colour=all(colour == shape.colour for (_, colour, _), shape in zip(seen, asked.shapes)),
        background=_nearest_colour(background) == asked.background,
        position=all(position == shape.position for (_, _, position), shape in zip(seen, asked.shapes)),
        cleanliness=_cleanliness(pixels, asked, resolution=min(image.width, 4 * VIEW)),
    )


def _view(image):
    """(VIEW, VIEW, 3) in [0, 1]."""
    image = image.convert("RGB")
    if image.size != (VIEW, VIEW):
        image = image.resize((VIEW, VIEW), Image.Resampling.BOX)
    return np.asarray(image, np.float32) / 255


def _border(pixels, width=2):
    frame = np.ones((VIEW, VIEW), bool)
    frame[width:-width, width:-width] = False
    return pixels[frame]


def _nearest_colour(colour):
    return min(COLOURS, key=lambda name: np.abs(np.array(COLOURS[name]) / 255 - colour).sum())


def _split(pixels, background):
    """Left and right region, parted at the column nearest the middle that holds least of any shape."""
    contrast = np.linalg.norm(pixels - background, axis=-1).sum(axis=0)
    low, high = int(0.3 * VIEW), int(0.7 * VIEW)
    column = min(range(low, high), key=lambda x: (round(float(contrast[x]), 1), abs(x - VIEW / 2)))
    left = np.zeros((VIEW, VIEW), bool)
    left[:, :column] = True
    return [left, ~left]


def _read_shape(pixels, background, region):
    """(kind, colour, position) of the shape in a region; None where there is none."""
    contrast = np.where(region, np.linalg.norm(pixels - background, axis=-1), 0.0)
    peak = np.sort(contrast, axis=None)[-4]  # a few stray pixels are no shape
    if peak < _LEAST_CONTRAST * np.sqrt(3):
        return None, None, None
    ink = pixels[contrast >= 0.8 * peak].mean(axis=0)
    direction = (ink - background) / np.square(ink - background).sum()
    coverage = np.where(region, np.clip((pixels - background) @ direction, 0, 1), 0.0)

    templates, energies = _templates()
    spectrum = torch.fft.rfft2(torch.from_numpy(coverage.astype(np.float32)), s=(2 * VIEW, 2 * VIEW))
    overlap = torch.fft.irfft2(spectrum * templates.conj(), s=(2 * VIEW, 2 * VIEW))[..., :VIEW, :VIEW]
    explained = 2 * overlap - energies  # |coverage|^2 - |coverage - outline|^2
    best = int(explained.argmax())
    if explained.flatten()[best] < _LEAST_MATCH * np.square(coverage).sum():
        return None, _nearest_colour(ink), None
    template, y, x = np.unravel_index(best, explained.shape)
    centre = np.array([x + 0.5, y + 0.5]) / VIEW
    position = min(POSITIONS, key=lambda name: np.square(np.array(POSITIONS[name]) - centre).sum())
    return KINDS[template // len(_RADII)], _nearest_colour(ink), position


@lru_cache(maxsize=1)
def _templates():
    """Spectra of every kind in every size, centred on pixel (0, 0), and each one's energy inside the view at every
    place: (kinds * sizes, ...)."""
    scale = 4
    templates = []
    for kind in KINDS:
        for radius in _RADII:
            canvas = Image.new("F", (2 * VIEW * scale,) * 2)
            centre = (VIEW + 0.5) * scale
            ImageDraw.Draw(canvas).polygon([(centre + x * VIEW * scale, centre + y * VIEW * scale)
                                            for x, y in outline(kind, radius)], fill=1.0)
            templates.append(np.roll(np.asarray(canvas.reduce(scale)), (-VIEW, -VIEW), axis=(0, 1)))
    rows, columns = torch.fft.fftfreq(2 * VIEW), torch.fft.rfftfreq(2 * VIEW)
    blur = torch.exp(-2 * (np.pi * _SOFTNESS) ** 2 * (rows[:, None] ** 2 + columns**2))
    spectra = torch.fft.rfft2(torch.from_numpy(np.stack(templates))) * blur
    templates = torch.fft.irfft2(spectra)
    inside = torch.zeros(2 * VIEW, 2 * VIEW)
    inside[:VIEW, :VIEW] = 1
    energies = torch.fft.irfft2(torch.fft.rfft2(inside) * torch.fft.rfft2(templates.square()).conj())
    return spectra, energies[..., :VIEW, :VIEW]


def _cleanliness(pixels, asked: Drawing, resolution: int) -> float:
    ideal = _view(render(asked, resolution))
    contrast = np.abs(ideal - np.array(COLOURS[asked.background]) / 255).mean()
    return float(1 / (1 + np.abs(pixels - ideal).mean() / contrast))
