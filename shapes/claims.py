"""The published claims as an experiment on the shapes world: many short runs from one base, then a report.

    bash scripts/reproduce_claims.sh [--smoke] [options]

Trains {diffusion-dpo, dspo, dmpo} x {plain, safeguarded, lambda 0, fixed lambda} and on winners only, each run by train.py,
with the published beta and mu, equal budgets, and latents and embeddings computed once. The noise has the offset that the
base was trained with, and the learning rate falls to 0 along a cosine after its warm-up, because the noise of small batches
makes a small base draw worse.

Learning rates are chosen by one rule for all: each configuration is trained at every rate of the grid (with a seed of
its own) and the rate is taken whose images for the selection prompts have the highest mean oracle score. A method's
common rate is the one with the highest mean of these scores over the method's configurations. The final runs, with
`--seeds` seeds, are judged on other prompts and pairs, whose captions the base was never trained on.

Each run ends in OUTPUT/runs/NAME.json; a second call continues where the first ended. shapes/claims_runs.py trains and
measures, shapes/claims_report.py reads the records.
"""

from common.errors import quiet_libraries, run_program
from common.options import parse
from shapes.claims_options import Settings


def main() -> None:
    [settings], _ = parse([Settings], program="python -m shapes.claims", description=__doc__)
    quiet_libraries()
    from shapes.claims_runs import experiment
    experiment(settings)


if __name__ == "__main__":
    run_program(main)
