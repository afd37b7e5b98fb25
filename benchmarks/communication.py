"""What several processes send each other in an optimizer step, counted; and a model of the step's time over GPUs.

    python -m benchmarks.communication

counts the collectives of two CPU processes over tiny models, for train.py's way and the official program's. The bytes of
the gradients' all-reduce are 4 a trainable parameter whatever the model, so the count carries over; the times that
follow from it are a model, whose assumptions are the flags: give --micro_step_ms what benchmarks.train_step measured.
"""

import functools
import json
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

from common.errors import UserError, run_program
from common.files import make_room
from common.options import option, parse

COUNTED = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "reduce",
           "barrier", "all_gather_object", "broadcast_object_list")


@dataclass
class CommunicationOptions:
    accumulation: int = option(4, "micro-steps of the counted optimizer step", at_least=1)
    model: Literal["sd15", "sdxl", "tiny"] = option("sd15", "whose time is modelled")
    micro_step_ms: float = option(0.0, "of 8 pairs on one GPU; as measured by train_step", at_least=0)
    optimizer_ms: float = option(20.0, "of an optimizer step on one GPU", at_least=0)
    effective_batch: int = option(2048, "pairs in an optimizer step", at_least=8)
    node_gbs: float = option(300.0, "GB/s of an all-reduce within a node (its bus bandwidth)", above=0)
    network_gbs: float = option(40.0, "GB/s of an all-reduce between nodes", above=0)
    overlap: float = option(0.8, "share of a backward pass that hides communication", at_least=0)
    json: str | None = option(None, "a file for the counts")


class Collectives:
    """Counts calls of torch.distributed and the bytes that go into them."""

    def __init__(self):
        self.calls, self.bytes = Counter(), Counter()

    def __enter__(self):
        import torch.distributed as dist
        counting = {name: functools.partial(self.count, name, getattr(dist, name)) for name in COUNTED}
        self.patches = mock.patch.multiple(dist, **counting)
        self.patches.start()
        return self

    def __exit__(self, *_):
        self.patches.stop()

    def count(self, name, function, *args, **kwargs):
        self.calls[name] += 1
        given = args[1] if name == "all_gather_into_tensor" else args[0] if args else kwargs.get("tensor")
        self.bytes[name] += getattr(given, "nbytes", 0)  # objects have none
        return function(*args, **kwargs)


def count_steps(folder: str, accumulation: int) -> None:
    """In each process: an optimizer step of each way, after one that is not counted; the main one writes it down."""
    import diffusers
    import torch
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

    from benchmarks.step import make_pairs, prepare, step_options
    from models.devices import start_accelerator
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    options = step_options("tiny", 1, accumulation, "no")
    accelerator = start_accelerator(options)
    table, counted = make_pairs(8, options.data.resolution), {}
    for variant in ("uncached", "baseline"):
        bench = prepare(variant, "tiny", 2, options, table, accelerator, Path(folder))
        assert isinstance(bench.policy, DistributedDataParallel)
        bench.policy.register_comm_hook(None, allreduce_hook)  # DDP's own reduction, but through torch.distributed
        bench.optimizer_step()
        with Collectives() as collectives:
            bench.optimizer_step()
        parameters = sum(parameter.numel() for parameter in bench.policy.parameters())
        counted[variant] = {"calls": collectives.calls, "bytes": collectives.bytes, "parameters": parameters}
    if accelerator.is_main_process:
        Path(folder, "counted.json").write_text(json.dumps(counted))


def count_in_two_processes(accumulation: int) -> dict[str, dict]:
    """By variant: {"calls", "bytes"} by collective, and the number of trainable "parameters"."""
    from accelerate import debug_launcher
    with tempfile.TemporaryDirectory() as folder:
        debug_launcher(count_steps, (folder, accumulation), num_processes=2)
        return json.loads(Path(folder, "counted.json").read_text())


def model_times(options: CommunicationOptions, parameters: int) -> list[str]:
    """Lines of a table: step time, speed-up and efficiency over GPUs, for DDP and FSDP2."""
    lines = ["| GPUs | micro-steps | DDP s | pairs/s | efficiency | FSDP2 s | pairs/s | efficiency |",
             "|---:|---:|---:|---:|---:|---:|---:|---:|"]
    micro, per_gpu = options.micro_step_ms / 1000, 8
    one_gpu = None
    for gpus in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        accumulation = options.effective_batch // (per_gpu * gpus)
        if accumulation * per_gpu * gpus != options.effective_batch:
            break  # from here on the batch cannot be divided
        bandwidth = (options.node_gbs if gpus <= 8 else options.network_gbs) * 1e9
        share = (gpus - 1) / gpus
        hidden = options.overlap * micro / 2  # about half of a micro-step is the backward pass
        all_reduce = 2 * share * 4 * parameters / bandwidth
        ddp = accumulation * micro + max(0.0, all_reduce - hidden) + options.optimizer_ms / 1000
        gathers = 2 * share * 2 * parameters / bandwidth  # bf16 weights, for the forward and for the backward pass
        scatter = share * 4 * parameters / bandwidth
        fsdp = (accumulation * (micro + max(0.0, gathers - options.overlap * micro))
                + max(0.0, scatter - hidden) + options.optimizer_ms / 1000 / gpus)
        one_gpu = one_gpu or (options.effective_batch / ddp, options.effective_batch / fsdp)
        cells = [gpus, accumulation]
        for seconds, base in zip((ddp, fsdp), one_gpu):
            rate = options.effective_batch / seconds
            cells += [f"{seconds:.2f}", f"{rate:.0f}", f"{rate / gpus / base:.1%}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def main() -> None:
    [options], _ = parse([CommunicationOptions], program="python -m benchmarks.communication", description=__doc__)
    if options.effective_batch % 8:
        raise UserError(f"--effective_batch {options.effective_batch} is no multiple of the 8 pairs of a micro-step")
    if options.json:
        make_room(options.json, "--json")
    counted = count_in_two_processes(options.accumulation)
    if options.json:
        Path(options.json).write_text(json.dumps(counted))
    print(f"An optimizer step of {options.accumulation} micro-steps, tiny model, 2 processes, counted on each:\n")
    print("| | collectives | all-reduced bytes | bytes a trainable parameter | others |\n|---|---:|---:|---:|---|")
    for variant, counts in counted.items():
        others = ", ".join(f"{number} {name}" for name, number in counts["calls"].items() if name != "all_reduce")
        reduced = counts["bytes"].get("all_reduce", 0)
        print(f"| {'train.py' if variant == 'uncached' else variant} | {sum(counts['calls'].values())} | {reduced} | "
              f"{reduced / counts['parameters']:.4f} | {others or 'none'} |")
    if not options.micro_step_ms:
        print("\nGive --micro_step_ms for the times over many GPUs.")
        return
    import torch

    from benchmarks.models import make_unet
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in make_unet(options.model).parameters())
    print(f"\n{options.model}: {parameters * 4 / 1e9:.2f} GB all-reduced a step. Modelled, with {options.micro_step_ms:g} "
          f"ms a micro-step of 8 pairs, {options.node_gbs:g} GB/s in a node of 8 and {options.network_gbs:g} GB/s between "
          "nodes:\n")
    print("\n".join(model_times(options, parameters)))


if __name__ == "__main__":
    run_program(main)
