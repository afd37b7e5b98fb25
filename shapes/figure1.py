"""The paper's figure 1 on the shapes world: where plain Diffusion-DPO breaks, and the safeguard holds.

    python -m shapes.figure1 [--output output/figure1]
    python -m shapes.figure1 --base sd3 --steps 200 --output output/figure1_sd3    # the same in flow matching

Two runs of train.py on pairs that OTHERS drew (rendered good and flawed drawings, as Pick-a-Pic's pairs are of other models
for SD1.5), equal but for the safeguard: winner's and loser's error over the steps, and the same captions drawn from the same
noise at steps 0, 25%, 50%, 75% and 100%. A second call continues with the run that is missing.
"""

from dataclasses import dataclass
from typing import Literal

from common.errors import quiet_libraries, run_program
from common.options import option, parse


@dataclass
class Settings:
    title = "the figure"

    output: str = option("output/figure1", "folder for the runs and the figure")
    base: Literal["sd15", "sd3"] = option("sd15", "the base that draws: noise prediction or flow matching")
    learning_rate: float = option(1.5e-4, "constant, after 20 warm-up steps", above=0)
    beta: float | None = option(None, "Diffusion-DPO's", above=0, default_text="train.py's: 5000; sd3 100")
    steps: int = option(400, "optimizer steps of each run", at_least=4)
    mu: float = option(0.9, "the safeguard's strength", at_least=0, at_most=1)
    batch_size: int = option(16, "pairs per step", at_least=1)
    pairs: int = option(400, "pairs trained on", at_least=2)
    captions: int = option(48, "unseen captions that the oracle judges", at_least=6)
    workers: int = option(2, "runs at a time, one thread each", at_least=1)
    seed: int = option(0, "of both runs", at_least=0)


def main() -> None:
    [settings], _ = parse([Settings], program="python -m shapes.figure1", description=__doc__)
    quiet_libraries()
    from shapes.figure1_runs import make_figure
    make_figure(settings)


if __name__ == "__main__":
    run_program(main)
