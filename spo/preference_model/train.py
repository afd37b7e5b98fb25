"""Trains SPO's step-aware preference model on Pick-a-Pic pairs (arXiv:2406.04314, section 3.1).

    accelerate launch -m spo.preference_model.train --config configs/train/spm_sd15.yaml [flags that win over the file]

Both images of a pair are noised to one timestep with one noise, restored in one step by the frozen base model, and scored
at that timestep. OUTPUT_DIR/step-aware_preference_model.bin has the official checkpoints' names; accuracy.json tells how
often the preferred image scores higher, at five timesteps, before and after training.
"""

from typing import TYPE_CHECKING

from common.errors import quiet_libraries, run_program
from common.train_options import TrainOptions
from spo.preference_model.options import parse_spm_options

if TYPE_CHECKING:
    from training.fit import Outcome, Watch


def train(options: TrainOptions, watch: "Watch | None" = None) -> "Outcome":
    """Train as the options say, and leave the weights in their output_dir; a library call as train.py's is."""
    from models.family import open_family
    family = open_family(options.model)
    options.data.resolution = options.data.resolution or family.resolution

    from common.signals import StopSignal
    from spo.preference_model.task import make_task
    from training.fit import fit
    from training.run import start_run
    with StopSignal() as stop:
        run = start_run(options, stop)
        task = make_task(run, family)
        outcome = fit(task, run, watch)
        path = task.save_result() if outcome.finished else None
        run.accelerator.end_training()
        if path:
            run.say(f"Done: {path}")
    return outcome


def main() -> None:
    options = parse_spm_options(description=__doc__)
    quiet_libraries()
    train(options)


if __name__ == "__main__":
    run_program(main)
