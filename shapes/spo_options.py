"""The options of shapes/spo_comparison.py."""

from dataclasses import dataclass

from common.options import option


@dataclass
class Settings:
    title = "the experiment"

    output: str = option("output/spo", "folder for runs and report")
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
        if self.smoke:
            self.seconds, self.points, self.seeds, self.prompts, self.pairs = 6.0, 2, 1, 4, 16
            self.spm_pairs, self.spm_steps, self.spo_prompts, self.inference_steps = 32, 2, 1, 4
            self.offline_rates = self.spo_rates = [2e-5]
