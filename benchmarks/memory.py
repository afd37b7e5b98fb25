"""What a training step needs of a GPU's memory, counted without a GPU.

    python -m benchmarks.memory [--models sd15 sdxl]
    python -m benchmarks.memory --models sd3 flux qwen_image z_image     # LoRA: benchmarks/flow_memory.py

The policy's forward and backward and the reference's forward are run on tensors that have shapes and a device but no
content (FakeTensor), under the autocast of training and with flash attention, and every storage that lives is counted;
weights, gradients and the optimizer's moments are added. `official` is the official program's way: VAE and text encoders on
the device, its images encoded eight at a time, and autocast's cache of rounded weights.

This is a computation, not a measurement: what it leaves out are the CUDA context (about 0.5 GiB), workspaces of the
libraries and fragmentation, which --margin stands for.
"""

from dataclasses import dataclass
from typing import Literal

from common.errors import run_program
from common.options import option, parse

CARDS = (16, 24, 40, 80)


@dataclass
class CountOptions:
    models: list[Literal["sd15", "sdxl", "tiny", "sd3", "flux", "qwen_image", "z_image"]] = option(
        ["sd15", "sdxl"], "what is counted")
    batches: list[int] = option([1, 2, 4, 8], "pairs in a micro-step, of UNets", at_least=1)
    resolutions: list[int] = option([512, 1024], "pixels a side, of transformers", at_least=16)
    margin: float = option(1.5, "GiB left for the context, workspaces and fragmentation", at_least=0)


def main() -> None:
    [options], _ = parse([CountOptions], program="python -m benchmarks.memory", description=__doc__)
    unets = [model for model in options.models if model in ("sd15", "sdxl", "tiny")]
    transformers = [model for model in options.models if model not in unets]
    print(f"GiB a GPU, computed, bf16, with a cache; fits: pairs in a micro-step with {options.margin} GiB to spare\n")
    if unets:
        print_table(unets, options.batches, options.margin)
    if transformers:
        from benchmarks.flow_memory import print_table as print_flow_table
        print_flow_table(transformers, options.resolutions, CARDS, options.margin)


def print_table(models: list[str], batches: list[int], margin: float) -> None:
    from benchmarks.step_memory import count_step, recomputed_share, settings
    most = batches[-1]
    print("| model | settings | policy | gradients | moments | reference | "
          + " | ".join(f"total, {batch} pairs" for batch in batches)
          + f" | {most} pairs, to official | recomputed | "
          + " | ".join(f"fits {card} GB" for card in CARDS) + " |")
    print("|---|---|" + "---:|" * (6 + len(batches) + len(CARDS)))
    for model in models:
        official = None
        for setting in settings(model):
            counts = {batch: count_step(setting, batch) for batch in batches}
            totals = {batch: count["total"] for batch, count in counts.items()}
            official = official or totals[most]
            fits = [max((batch for batch, total in totals.items() if total + margin <= card), default=0)
                    for card in CARDS]
            cells = [model, str(setting),
                     *(f"{counts[most][name]:.1f}" for name in ("policy", "gradients", "moments", "reference")),
                     *(f"{total:.1f}" for total in totals.values()), f"{totals[most] / official:.2f}",
                     f"{recomputed_share(setting):.0%}",
                     *(str(fit) if fit else "no" for fit in fits)]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    run_program(main)
