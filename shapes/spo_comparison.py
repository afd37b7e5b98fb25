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

from dataclasses import dataclass

from common.errors import quiet_libraries, run_program
from common.options import option, parse


@dataclass
class Settings:
    title = "the experiment"

    output: str | None = option(None, "folder for runs and report", default_text="output/spo or output/spo_smoke")
    base: str | None = option(None, "another pipeline than the shapes world's base")
    smoke: bool = option(False, "tiny budgets: does everything run?")
    seconds: float = option(90.0, "processor seconds of training of each run", above=0)
    points: int = option(6, "judgements of each run, evenly over its time", at_least=1)
    seeds: int = option(2, "final runs of each method", at_least=1)
    offline_rates: list[float] = option([5e-6, 2e-5, 8e-5], "the grid", above=0)
    spo_rates: list[float] = option([5e-6, 2e-5, 8e-5], "SPO's grid", above=0)
    prompts: int = option(64, "prompts judged, for selection and for the table each", at_least=1)
    pairs: int = option(400, "pairs for the offline methods", at_least=2)
    spm_pairs: int = option(4000, "pairs for the step-aware preference model", at_least=1)
    spm_steps: int = option(1500, "its optimizer steps", at_least=1)
    spo_prompts: int = option(8, "prompts that SPO samples at once", at_least=1)
    inference_steps: int = option(20, "DDIM steps of each judged image", at_least=1)
    workers: int = option(2, "runs at a time, one thread each", at_least=1)

    def __post_init__(self):
        self.output = self.output or ("output/spo_smoke" if self.smoke else "output/spo")
        if self.smoke:
            self.seconds, self.points, self.seeds, self.prompts, self.pairs = 6.0, 2, 1, 4, 16
            self.spm_pairs, self.spm_steps, self.spo_prompts, self.inference_steps = 32, 2, 1, 4
            self.offline_rates = self.spo_rates = [2e-5]


def main() -> None:
    [settings], _ = parse([Settings], program="python -m shapes.spo_comparison", description=__doc__)
    quiet_libraries()
    from shapes.spo_runs import experiment
    experiment(settings)


if __name__ == "__main__":
    run_program(main)
