"""What objectives cost beside each other, in one run: MaPO, which has no reference, against Diffusion-DPO.

    python -m benchmarks.objectives [--methods diffusion-dpo mapo ...]

The training step is train.py's, with a cache and the safeguard, on the tiny SD1.5 with random weights. Peak memory is every
storage that lives during a step: weights, gradients, moments and activations. Steps are timed in turns, and the median counts:
of a CPU, the process's CPU time. Ratios are to the first method.
"""

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.errors import quiet_libraries, run_program
from common.options import option, parse
from common.train_options import PAIRWISE

MODEL = "tiny"


@dataclass
class ObjectivesOptions:
    methods: list[Literal[PAIRWISE]] = option(["diffusion-dpo", "mapo"], "what is measured")
    batch: int = option(8, "pairs in a step", at_least=1)
    repeats: int = option(20, "steps timed of each, in turns", at_least=1)


def prepared(method: str, options: ObjectivesOptions, folder: Path) -> tuple:
    """A method's training step (a Bench), and the peak of its bytes in its second step."""
    from benchmarks.models import RESOLUTIONS
    from benchmarks.step import make_pairs, prepare, step_options
    from benchmarks.step_memory import LiveBytes
    from models.devices import start_accelerator

    train = step_options(MODEL, options.batch, 1, "no", f"--train_method={method}")
    table, accelerator = make_pairs(4 * options.batch, RESOLUTIONS[MODEL]), start_accelerator(train)
    with LiveBytes(()) as bytes_:
        bench = prepare("cached", MODEL, options.repeats + 2, train, table, accelerator, folder)
        bench.optimizer_step()
        bytes_.peak = bytes_.live
        bench.optimizer_step()
    return bench, bytes_.peak


def main() -> None:
    [options], _ = parse([ObjectivesOptions], program="python -m benchmarks.objectives", description=__doc__)
    quiet_libraries()
    import torch
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        benches = {method: prepared(method, options, Path(folder)) for method in options.methods}
        times = {method: [] for method in benches}
        for _ in range(options.repeats):
            for method, (bench, _) in benches.items():
                start = bench.parts.mark()
                bench.optimizer_step()
                times[method].append(bench.parts.between(start, bench.parts.mark()))
    print("| method | step, ms | to the first | peak memory, MiB | to the first |\n|---|---:|---:|---:|---:|")
    step, peak = statistics.median(times[options.methods[0]]), benches[options.methods[0]][1]
    for method, (_, bytes_) in benches.items():
        own = statistics.median(times[method])
        print(f"| {method} | {own:.1f} | {own / step:.2f} | {bytes_ / 2**20:.2f} | {bytes_ / peak:.2f} |")


if __name__ == "__main__":
    run_program(main)
