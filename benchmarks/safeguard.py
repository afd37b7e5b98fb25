"""What the SDPO safeguard costs: its own time, at full-size predictions, against what the UNets must compute.

    python -m benchmarks.safeguard

The loss with and without the safeguard is timed in turns on predictions of the published sizes (8 pairs), forward and
backward. On a GPU a micro-step's time comes from benchmarks.train_step (--micro_step_ms); on a CPU from the least that
the UNets' counted operations can take on this machine, at its measured rate of matrix products.
"""

from dataclasses import dataclass
from typing import Literal

from common.errors import run_program
from common.options import option, parse


@dataclass
class SafeguardOptions:
    batch: int = option(8, "pairs in a micro-step", at_least=1)
    repeats: int = option(30, "timings of each, in turns; the median counts", at_least=1)
    micro_step_ms: float = option(0.0, "a measured micro-step, in place of the least time", at_least=0)
    models: list[Literal["sd15", "sdxl", "tiny"]] = option(["sd15", "sdxl"], "whose predictions")


def main() -> None:
    [options], _ = parse([SafeguardOptions], program="python -m benchmarks.safeguard", description=__doc__)
    import torch

    from benchmarks.models import RESOLUTIONS
    from benchmarks.step import unet_forward_flops
    from benchmarks.timing import Parts, matrix_rate
    from losses import LossConfig, preference_loss

    def loss_time(side: int, guarded: bool) -> float:
        """Milliseconds of the loss of one micro-step, forward and backward."""
        shape = (2 * options.batch, 4, side // 8, side // 8)
        prediction, reference, target = (torch.randn(shape, device=device) for _ in range(3))
        prediction.requires_grad_(True)
        config, parts = LossConfig(use_winner_preserving=guarded, winner_preserving_mu=0.9), Parts(device)
        start = parts.mark()
        preference_loss(prediction, reference, target, config).loss.backward()
        return parts.between(start, parts.mark())

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    rate = matrix_rate(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    print("| model | loss, ms | with the safeguard, ms | the UNets' micro-step, ms | safeguard's share |")
    print("|---|---:|---:|---:|---:|")
    for model in options.models:
        times = {False: [], True: []}
        for _ in range(options.repeats):
            for guarded in (False, True):
                times[guarded].append(loss_time(RESOLUTIONS[model], guarded))
        plain, guarded = (torch.tensor(times[kind]).median().item() for kind in (False, True))
        least = 4 * unet_forward_flops(model, 2 * options.batch, RESOLUTIONS[model]) / rate * 1000
        micro_step, said = options.micro_step_ms or least, "" if options.micro_step_ms else " at least"
        print(f"| {model} | {plain:.2f} | {guarded:.2f} | {micro_step:.0f}{said} | {(guarded - plain) / micro_step:.4%} |")


if __name__ == "__main__":
    run_program(main)
