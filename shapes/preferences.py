"""Preference pairs for the base model, in Pick-a-Pic's columns.

    python -m shapes.preferences --output output/preferences --num_pairs 400 --seed 0

Half of the pairs are drawn by the base model, four times under one caption: the winner is the drawing that the oracle
likes best, the loser another of them, and a share of labels is turned round, as human labels are. The other half are
rendered: a clean winner and a slightly flawed loser. Winner and loser are close in both, so that their gradients agree:
there plain Diffusion-DPO is said to harm the winner.
"""

import os
import random
from argparse import ArgumentParser
from pathlib import Path

from diffusers import StableDiffusionPipeline

from shapes.base import RESOLUTION, sample_drawing
from shapes.drawing import FLAW_NAMES, caption, random_flaws, render
from shapes.oracle import judge
from shapes.pairs import pair_row, write_rows
from shapes.pipeline import base_pipeline, draw_images
from common.errors import UserError, run_program

LABEL_NOISE = 0.1  # share of generated pairs whose label is turned round
CANDIDATES = 4  # images drawn for a generated pair
FLAW_STRENGTH = (0.15, 0.5)  # of a rendered loser
BASE_NAME = "shapes/base"


def write_preferences(folder: str | os.PathLike, num_pairs: int, seed: int = 0, num_inference_steps: int = 20,
                      unseen: bool = False) -> Path:
    """Write `num_pairs` pairs of 32x32 images into parquet files in `folder` and return it as a Path.

    Captions are of those the base was trained on, or with `unseen` of those held out. model_0 and model_1 tell the
    halves apart: BASE_NAME for generated pairs. Raises UserError where num_pairs is below two.
    """
    if num_pairs < 2:
        raise UserError(f"num_pairs is {num_pairs}: ask for at least two, one generated and one rendered")
    rng = random.Random(seed)
    prompts = [caption(sample_drawing(rng, unseen)) for _ in range(num_pairs // 2)]
    pipeline = StableDiffusionPipeline.from_pretrained(base_pipeline())
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
    parser = ArgumentParser(description="Write preference pairs drawn by the base model and ranked by the oracle.")
    parser.add_argument("--output", required=True, help="folder for the parquet files")
    parser.add_argument("--num_pairs", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_inference_steps", type=int, default=20)
    args = parser.parse_args()
    folder = write_preferences(args.output, args.num_pairs, args.seed, args.num_inference_steps)
    print(f"{args.num_pairs} pairs in {folder}")


if __name__ == "__main__":
    run_program(main)
