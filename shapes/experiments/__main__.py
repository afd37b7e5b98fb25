"""Where plain preference training breaks, what the safeguard is worth, and how the objectives rank, on the shapes world.

    bash scripts/reproduce_claims.sh [--smoke | --long | --full] [options]

From one small base, many short runs of train.py on cached pairs, each judged by the oracle as it goes. Seed 0 runs every rate
of the grid and chooses each configuration's best (rate, steps); the figures reported are those of the further seeds, at that
rate and step. All runs of a base draw the same captions from the same noise.

Each run ends in OUTPUT/runs/WORLD/NAME.json, and a second call does what is missing, the most telling first.
OUTPUT/claims.md, with its pictures, is the report; an interrupted call writes it too and says what is missing.
"""

from common.errors import quiet_libraries, run_program
from common.options import parse
from shapes.experiments.plan import Settings


def main() -> None:
    [settings], _ = parse([Settings], program="python -m shapes.experiments", description=__doc__)
    quiet_libraries()
    from shapes.experiments.experiment import experiment
    experiment(settings)
    if settings.full:
        experiment(settings.long_runs)


if __name__ == "__main__":
    run_program(main)
