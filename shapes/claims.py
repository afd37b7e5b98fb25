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

from dataclasses import dataclass

from common.errors import quiet_libraries, run_program
from common.options import option, parse


@dataclass
class Settings:
    title = "the experiment"

    output: str = option("output/claims", "folder for the runs and the report")
    smoke: bool = option(False, "one seed and tiny budgets: does everything run?")
    seeds: int = option(3, "final runs of each configuration", at_least=1)
    learning_rates: list[float] = option([5e-6, 2e-5, 8e-5], "the grid")
    steps: int = option(100, "optimizer steps of each run", at_least=1)
    batch_size: int = option(8, "pairs per step", at_least=1)
    train_pairs: int = option(400, "pairs trained on", at_least=2)
    held_out_pairs: int = option(64, "pairs on which errors are measured", at_least=2)
    selection_prompts: int = option(48, "prompts that choose the learning rate", at_least=1)
    test_prompts: int = option(96, "prompts that judge the final runs", at_least=1)
    inference_steps: int = option(20, "DDIM steps of each image", at_least=1)
    instrument_steps: int = option(40, "steps on which each kind of lambda is measured", at_least=1)
    timing_rounds: int = option(12, "rounds of three steps, plain and safeguarded by turns", at_least=2)
    workers: int = option(2, "runs at a time, one thread each", at_least=1)

    def __post_init__(self):
        if self.smoke:
            self.seeds, self.learning_rates, self.steps, self.batch_size = 1, [2e-5, 8e-5], 6, 4
            self.train_pairs, self.held_out_pairs, self.selection_prompts, self.test_prompts = 40, 8, 8, 16
            self.inference_steps, self.instrument_steps, self.timing_rounds = 5, 3, 3


def main() -> None:
    [settings], _ = parse([Settings], program="python -m shapes.claims", description=__doc__)
    quiet_libraries()
    from shapes.claims_runs import experiment
    experiment(settings)


if __name__ == "__main__":
    run_program(main)
