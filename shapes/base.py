"""The base model that draws: its data, its autoencoder and its text encoder, trained from nothing.

scripts/build_base.sh runs the steps, of which the UNet's training is train.py's own:

    python -m shapes.base prepare --output output/base     # pairs, autoencoder, text encoder, untrained UNet
    train.py --train_method sft ...                         # the UNet
    python -m shapes.base ship --output output/base        # float16 weights into shapes/base
    python -m shapes.base judge                           # what the oracle says of its drawings

The base is trained on a mixture of good and poor drawings under the same captions, as real base models are, so that
preference tuning has something to gain; captions for which held_out() is true are never shown to it.
"""

import random
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

from common.errors import quiet_libraries, run_program
from common.options import option, parse
from shapes.drawing import COLOURS, FLAW_NAMES, KINDS, Drawing, Flaws, caption, random_drawing, random_flaws, render
from shapes.pairs import pair_row, write_rows

RESOLUTION = 32
POOR_SHARE = 0.5  # of the drawings the base learns from
POOR_STRENGTH = (0.2, 0.55)  # of their flaws


@dataclass
class BaseOptions:
    step: Literal["prepare", "ship", "judge"] = option(MISSING, "what to do", positional=True)
    output: str = option("output/base", "folder of the build")
    seed: int = option(0, "of weights and data", at_least=0)
    num_prompts: int = option(100, "seen and unseen prompts, each, to judge", at_least=1)


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


def main() -> None:
    [options], _ = parse([BaseOptions], program="python -m shapes.base", description=__doc__)
    quiet_libraries()
    from shapes import base_model

    if options.step == "prepare":
        base_model.prepare(Path(options.output), options.seed)
    elif options.step == "ship":
        base_model.ship(Path(options.output))
    else:
        base_model.judge_base(options.num_prompts)


if __name__ == "__main__":
    run_program(main)
