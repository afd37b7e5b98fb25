"""What the base model is trained on: captions, of which some are held out, and a mixture of good and poor drawings."""

import random
from pathlib import Path

from shapes.drawing import COLOURS, FLAW_NAMES, KINDS, Drawing, Flaws, caption, random_drawing, random_flaws, render
from shapes.pairs import pair_row, write_rows

RESOLUTION = 32
POOR_SHARE = 0.5  # of the drawings the base learns from
POOR_STRENGTH = (0.2, 0.55)  # of their flaws


def held_out(drawing: Drawing) -> bool:
    """Whether the base never saw this caption: one in eight (shape, colour, background) triples is kept from it."""
    kinds, colours = sorted(KINDS), sorted(COLOURS)
    background = colours.index(drawing.background)
    return any((kinds.index(shape.kind) + 3 * colours.index(shape.colour) + 5 * background) % 8 == 0
               for shape in drawing.shapes)


def sample_drawing(rng: random.Random, unseen: bool) -> Drawing:
    """A random drawing, from the captions held out from the base or from the others."""
    while True:
        drawing = random_drawing(rng)
        if held_out(drawing) == unseen:
            return drawing


def sample_captions(rng: random.Random, count: int, unseen: bool) -> list[str]:
    """Captions of random drawings, which may repeat: those held out from the base, or others."""
    return [caption(sample_drawing(rng, unseen)) for _ in range(count)]


def mixed_flaws(rng: random.Random) -> Flaws:
    """The flaws (often none) of one drawing of the mixture that the base learns."""
    if rng.random() >= POOR_SHARE:
        return Flaws()
    return random_flaws(rng, rng.choice(FLAW_NAMES), *POOR_STRENGTH)


def write_training_pairs(folder: Path, num_pairs: int, seed: int) -> None:
    """Two drawings of the mixture per caption, seen captions only, labelled at random: what train.py's sft reads."""
    rng = random.Random(seed)
    rows = []
    for _ in range(num_pairs):
        drawing = sample_drawing(rng, unseen=False)
        first, second = (render(drawing, RESOLUTION, mixed_flaws(rng)) for _ in range(2))
        rows.append(pair_row(caption(drawing), first, second, rng))
    write_rows(folder, rows)
