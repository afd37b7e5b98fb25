"""Preference pairs for the base model, in Pick-a-Pic's columns.

    python -m shapes.preferences --output output/preferences --num_pairs 400 --seed 0

Half of the pairs are drawn by the base model, four times under one caption: the winner is the drawing that the oracle
likes best, the loser another of them, and a share of labels is turned round, as human labels are. The other half are
rendered: a clean winner and a slightly flawed loser. Winner and loser are close in both, so that their gradients agree:
there plain Diffusion-DPO is said to harm the winner.
"""

import os
import random
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError, quiet_libraries, run_program
from common.options import option, parse
from shapes.mixture import RESOLUTION, sample_captions, sample_drawing
from shapes.drawing import FLAW_NAMES, caption, random_flaws, render
from shapes.pairs import pair_row, write_rows

LABEL_NOISE = 0.1  # share of generated pairs whose label is turned round
CANDIDATES = 4  # images drawn for a generated pair
FLAW_STRENGTH = (0.15, 0.5)  # of a rendered loser
BASE_NAME = "shapes/base"


@dataclass
class PreferencesOptions:
    output: str = option("output/preferences", "folder for the parquet files")
    num_pairs: int = option(400, "how many", at_least=2)
    seed: int = option(0, "of captions, images and labels", at_least=0)
    num_inference_steps: int = option(20, "DDIM steps of a generated image", at_least=1)


def write_preferences(folder: str | os.PathLike, num_pairs: int, seed: int = 0, num_inference_steps: int = 20,
                      unseen: bool = False, drawn_share: float = 0.5) -> Path:
    """Write `num_pairs` pairs of 32x32 images into parquet files in `folder` and return it as a Path.

    Captions are of those the base was trained on, or with `unseen` of those held out. drawn_share: of the pairs, how many
    the base draws. model_0 and model_1 tell them apart: BASE_NAME for generated pairs. Raises UserError where num_pairs is
    below two.
    """
    if num_pairs < 2:
        raise UserError(f"num_pairs is {num_pairs}: ask for at least two, one generated and one rendered")

    from shapes.oracle import judge
    from shapes.pipeline import draw_images, open_base

    rng = random.Random(seed)
    prompts = sample_captions(rng, int(num_pairs * drawn_share), unseen)
    pipeline = open_base()
    images = draw_images(pipeline, [prompt for prompt in prompts for _ in range(CANDIDATES)], seed * 1_000_003,
                         num_inference_steps)
    rows = []
    for index, prompt in enumerate(prompts):
        ranked = sorted(images[index * CANDIDATES:(index + 1) * CANDIDATES], key=lambda image: judge(image, prompt).score)
        winner, loser = ranked[-1], rng.choice(ranked[:-1])
        if rng.random() < LABEL_NOISE:
            winner, loser = loser, winner
        rows.append(pair_row(prompt, winner, loser, rng) | {"model_0": BASE_NAME, "model_1": BASE_NAME})
    for index in range(num_pairs - len(rows)):
        drawing = sample_drawing(rng, unseen)
        flaws = random_flaws(rng, FLAW_NAMES[index % len(FLAW_NAMES)], *FLAW_STRENGTH)
        rows.append(pair_row(caption(drawing), render(drawing, RESOLUTION), render(drawing, RESOLUTION, flaws), rng))
    rng.shuffle(rows)
    return write_rows(folder, rows)


def main() -> None:
    [options], _ = parse([PreferencesOptions], program="python -m shapes.preferences", description=__doc__)
    quiet_libraries()
    folder = write_preferences(options.output, options.num_pairs, options.seed, options.num_inference_steps)
    print(f"{options.num_pairs} pairs in {folder}")


if __name__ == "__main__":
    run_program(main)
