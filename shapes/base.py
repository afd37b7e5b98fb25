"""The base models that draw: their data, autoencoder and text encoder, and their networks, trained from nothing.

scripts/build_base.sh runs the steps, of which the network's training is train.py's own:

    python -m shapes.base prepare --output output/base    # pairs, autoencoder, text encoder, untrained UNet
    train.py --train_method sft ...                        # the UNet
    python -m shapes.base ship --output output/base       # float16 weights into shapes/base
    python -m shapes.base judge                          # what the oracle says of its drawings

With --kind sd3 they are those of the SD3-shaped base in flow matching, which takes autoencoder and text encoder over from
shapes/base; `python -m shapes.base train --kind sd3` trains it by train.py's sft and keeps the weights' moving average.

A base is trained on a mixture of good and poor drawings under the same captions, as real base models are, so that
preference tuning has something to gain; captions for which mixture.held_out() is true are never shown to it.
"""

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

from common.errors import UserError, quiet_libraries, run_program
from common.options import option, parse


@dataclass
class BaseOptions:
    step: Literal["prepare", "train", "ship", "judge"] = option(MISSING, "what to do", positional=True)
    kind: Literal["sd15", "sd3"] = option("sd15", "noise prediction by a UNet, or flow matching by a transformer")
    output: str = option("output/base", "folder of the build")
    seed: int = option(0, "of weights and data", at_least=0)
    num_prompts: int = option(100, "seen and unseen prompts, each, to judge; the picture shows 40", at_least=40)


def main() -> None:
    [options], _ = parse([BaseOptions], program="python -m shapes.base", description=__doc__)
    quiet_libraries()
    flow, output = options.kind == "sd3", Path(options.output)
    if options.step == "train" and not flow:
        raise UserError("the UNet is trained by train.py itself: bash scripts/build_base.sh")
    from shapes import base_model, sd3_model

    if options.step == "prepare":
        (sd3_model if flow else base_model).prepare(output, options.seed)
    elif options.step == "train":
        sd3_model.train_transformer(output, options.seed)
    elif options.step == "ship":
        (sd3_model if flow else base_model).ship(output)
    else:
        base_model.judge_base(options.kind, options.num_prompts)


if __name__ == "__main__":
    run_program(main)
