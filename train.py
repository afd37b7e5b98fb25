"""Preference optimisation of a text-to-image diffusion model: Diffusion-DPO, DSPO, DMPO, with or without the
winner-preserving safeguard (Diffusion-SDPO), supervised fine-tuning on winners, and SPO.

    accelerate launch train.py --config configs/train/sd15_diffusion_dpo.yaml [flags that win over the file]

It reads from top to bottom: options, family, pairs, policy and reference, fit, result. The mathematics is in losses/, the
loop in training/fit.py.
"""

import shlex
import time
from typing import TYPE_CHECKING

from common.errors import quiet_libraries, run_program
from common.progress import duration
from common.train_checks import parse_options
from common.train_options import TrainOptions
from prompts import prompts_of
from spo.options import SPOOptions, check_spo_options

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from models.family import Family
    from training.fit import Outcome, Task, Watch
    from training.run import Run


def train(options: TrainOptions, watch: "Watch | None" = None,
          make_task: "Callable[[Run, Family], Task] | None" = None) -> "Outcome":
    """Train as the options say, and leave the result in their output_dir; a library call.

    watch(step, network, scalars) is called before the first step and after each. make_task: for experiments, what makes
    another task than the options name. Raises UserError for what the user can put right. Nothing heavy is imported before
    the options are known to be good and the base to be there.
    """
    start = time.monotonic()
    options.run.validation_prompts = prompts_of(options.run.validation_prompts)

    # 1. The base: which family it is, and what follows from that.
    from models.family import open_family
    family = open_family(options.model)
    from training.defaults import settle_defaults
    settle_defaults(options, family)

    # 2. The run: devices, folder, seed.
    from common.signals import StopSignal
    from models.devices import shard_by
    from training.fit import Outcome, fit
    from training.run import start_run
    with StopSignal() as stop, start_run(options, stop) as run:
        shard_by(run.accelerator, family.compiled_blocks)

        # 3. What is learned from what: pairs or prompts, policy and reference.
        if make_task is None and options.objective.train_method == "spo":
            from spo.task import make_task  # online: it samples its pairs itself, from prompts
        elif make_task is None:
            from training.preference import make_task
        task = make_task(run, family)
        if options.run.dry_run:
            from training.dry_run import STEPS, dry_run
            dry_run(task, run, family)
            return Outcome(STEPS, finished=False)

        # 4. The loop.
        outcome = fit(task, run, watch)

        # 5. The result: weights, and a pipeline that diffusers opens.
        left = trained = None
        if outcome.finished and outcome.step > 0:
            from training.result import save_result
            left, trained = save_result(run, family, task.policy)
        run.accelerator.end_training()
        if left:
            run.say(f"Done in {duration(time.monotonic() - start)}: {left}")
            if replaced := task.record().get("bad_pairs"):
                run.say(f"{replaced} pairs could not be used and were replaced: {run.output_dir}/bad_data.jsonl says why")
            run.say(what_next(options, family, trained))
            if options.run.push_to_hub and run.main:
                from training.hub import push
                run.say(f"Published at {push(options, family.license)}")
    return outcome


def what_next(options: TrainOptions, family: "Family", trained: "Path") -> str:
    """The commands that draw with the result, told of a base and a size that are not the published ones."""
    side = options.data.resolution
    base = f"--pretrained_model_name_or_path {shlex.quote(options.model.pretrained_model_name_or_path)}"
    base += f" --height {side} --width {side}" if side != family.resolution else ""
    return (f"Next: python -m eval.generate --unet_path {trained} --prompts YOUR_PROMPTS.txt {base}\n"
            f"or, with the published prompts and metrics: bash scripts/eval/test_{family.name}.sh {trained} {base}")


def main() -> int:
    options = parse_options(None, SPOOptions, description=__doc__)
    check_spo_options(options)
    quiet_libraries()
    outcome = train(options)
    return 0 if outcome.step > 0 or not outcome.finished else 3  # 3: nothing was learned, its reason was reported


if __name__ == "__main__":
    run_program(main)
