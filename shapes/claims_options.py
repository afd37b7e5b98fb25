"""The options of shapes/claims.py, which its runs read too."""

from dataclasses import dataclass

from common.options import option

METHODS = {"diffusion-dpo": 0.9, "dspo": 0.2, "dmpo": 0.9}  # the published mu; beta and alpha are train.py's defaults
VARIANTS = ("plain", "safeguarded", "lambda 0", "fixed lambda")


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
