"""SPO beside the offline methods at equal time on the shapes world: is it faster, and does the safeguard carry over?

    bash scripts/compare_spo.sh [--smoke] [options]

A step-aware preference model is trained on drawn pairs by spo.preference_model.train. Then every method trains the same base
for the same processor time of one core (reading models and judging images apart), the whole UNet, each run by train.py: the
offline ones on pairs that the base drew and the oracle ranked, encoded once, SPO on its own samples. Every few seconds the
images for fixed prompts, whose captions the base was never trained on, are judged by the oracle.

Variants of SPO: "spo" as published; "spo, oracle judge" scores the pools by the oracle itself, the most that a better
preference model could give; "spo, winners only" takes no gradient through the losers, the safeguard's extreme
(lambda 0). How far the safeguard would act on SPO's pairs at mu = 0.9 is measured on the way.

A method's rate is the one of the grid whose images have the highest mean score over the second half of the time, with
seed 0 and selection prompts; the table is of other seeds and other prompts.
OUTPUT/runs/NAME.json holds a run; a second call continues where the first ended. OUTPUT/spo.md and spo.png are the
report.
"""

from common.errors import quiet_libraries, run_program
from common.options import parse
from shapes.spo_options import Settings


def main() -> None:
    [settings], _ = parse([Settings], program="python -m shapes.spo_comparison", description=__doc__)
    quiet_libraries()
    from shapes.spo_runs import experiment
    experiment(settings)


if __name__ == "__main__":
    run_program(main)
