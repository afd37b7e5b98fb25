"""The base model that draws: its data, its autoencoder and its text encoder, trained from nothing.

scripts/build_base.sh runs the steps, of which the UNet's training is train.py's own:

    python -m shapes.base prepare --output output/base    # pairs, autoencoder, text encoder, untrained UNet
    train.py --train_method sft ...                        # the UNet
    python -m shapes.base ship --output output/base       # float16 weights into shapes/base
    python -m shapes.base judge                          # what the oracle says of its drawings

The base is trained on a mixture of good and poor drawings under the same captions, as real base models are, so that
preference tuning has something to gain; captions for which mixture.held_out() is true are never shown to it.
"""

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

from common.errors import quiet_libraries, run_program
from common.options import option, parse


@dataclass
class BaseOptions:
    step: Literal["prepare", "ship", "judge"] = option(MISSING, "what to do", positional=True)
    output: str = option("output/base", "folder of the build")
    seed: int = option(0, "of weights and data", at_least=0)
    num_prompts: int = option(100, "seen and unseen prompts, each, to judge", at_least=1)


def main() -> None:
    [options], _ = parse([BaseOptions], program="python -m shapes.base", description=__doc__)
    quiet_libraries()
    from shapes import base_model

    if options.step == "prepare":
        base_model.prepare(Path(options.output), options.seed)
    elif options.step == "ship":
        base_model.ship(Path(options.output))
    else:
        base_model.judge_base(options.num_prompts)


if __name__ == "__main__":
    run_program(main)
