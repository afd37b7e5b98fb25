"""--dry_run: two real steps, and what they say of the whole run: memory, time, disk, and what would lower them."""

import shutil
import time

import torch

from common.errors import UserError
from common.locks import release
from common.progress import duration
from models.family import Family
from training.fit import Task, fit
from training.run import Run

STEPS = 2
MANY_PASSES = 100  # over the data, more of which the report advises against
MOST_ACCUMULATED = 2  # micro-steps of a measured step: more of them take longer and no more memory
GIB = 2**30


class Measured(Exception):
    """Enough steps were taken."""


def dry_run(task: Task, run: Run, family: Family) -> None:
    """Take two steps of the task, print what the whole run will take, and leave nothing behind. Raises UserError where the
    device's memory does not hold them."""
    options, ends, peak = run.options, [], [0.0]
    summary, pairs_per_step = task.summary(), run.pairs_per_step
    summary["output"] = f"{options.run.output_dir}, but nothing is written there: a dry run"
    task.summary = lambda: summary
    options.run.resume_from_checkpoint = "none"
    asked = options.optimizer.gradient_accumulation_steps
    options.optimizer.gradient_accumulation_steps = measured = min(asked, MOST_ACCUMULATED)

    def watch(step: int, network: torch.nn.Module, scalars: dict[str, float]) -> None:
        if step < len(ends):
            return  # SPO sampled a round without a pair to learn from
        ends.append(time.perf_counter())
        peak[0] = scalars.get("peak_memory_gb", 0.0)
        if step == STEPS:
            raise Measured

    parents = [folder for folder in run.output_dir.absolute().parents if not folder.exists()]
    try:
        fit(task, run, watch)
    except Measured:
        run.accelerator.wait_for_everyone()
    except torch.OutOfMemoryError:
        lower = "; ".join(what_lowers_memory(task, run, family))
        raise UserError(f"out of memory on {run.device}, which has {total_memory(run.device):.1f} GiB. Lower it with: "
                        f"{lower or 'a larger device'}") from None
    finally:
        options.optimizer.gradient_accumulation_steps = asked
        if run.main:
            release(run.output_dir)
            shutil.rmtree(run.output_dir, ignore_errors=True)
            for folder in parents:  # the nearest first; one that another program filled since stays
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
    if len(ends) <= STEPS:  # the data ended before, or no step was taken
        raise UserError(f"there are not {STEPS} steps to measure: raise --max_train_steps")
    step_time = (ends[2] - ends[1]) * asked / measured  # the first step allocates and compiles
    peak = float(run.accelerator.gather(torch.tensor([peak[0]], device=run.device)).max())
    if run.main:
        print("\n".join(report(task, run, family, peak, step_time, ends[1] - ends[0], pairs_per_step, measured)), flush=True)
    run.accelerator.end_training()


def report(task: Task, run: Run, family: Family, peak: float, step_time: float, first: float, pairs_per_step: int,
           measured: int) -> list[str]:
    options = run.options
    asked = options.optimizer.gradient_accumulation_steps
    how = f"; measured on {measured} of its {asked} micro-steps" if measured < asked else ""
    lines = {
        "memory": f"peak {peak:.2f} GiB of {total_memory(run.device):.1f} GiB, "
                  + ("per device" if run.device.type == "cuda" else "of the process"),
        "time": f"{step_time:.3g} s per step, {pairs_per_step / step_time:.3g} pairs/s (the first took {first:.3g} s{how})",
    }
    if task.max_steps:
        lines["whole run"] = (f"{task.max_steps} steps in {duration(task.max_steps * step_time)}, loading, checkpoints and "
                              "validation aside")
        lines["disk"] = disk(task, run, family)
    advice = {"less memory": what_lowers_memory(task, run, family), "less time": what_lowers_time(task, run),
              "less disk": what_lowers_disk(task, run)}
    lines |= {name: "; ".join(found) for name, found in advice.items() if found}
    return ["Dry run", *(f"  {name:<11} {text}" for name, text in lines.items())]


# --- sizes -------------------------------------------------------------------------------------------------------------

def nbytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def size(count: float) -> str:
    return f"{count / GIB:.3g} GiB" if count > GIB / 10 else f"{count / 2**20:.3g} MiB"


def optimizer_bytes(run: Run) -> int:
    """Of the optimizer's state, all of it."""
    states = [state for optimizer in run.accelerator._optimizers for state in optimizer.optimizer.state.values()]
    return nbytes(value for state in states for value in state.values() if isinstance(value, torch.Tensor))


def checkpoint_bytes(task: Task, run: Run) -> int:
    copies = 1 if run.options.objective.reference_ema is None else 2  # the reference is kept too, where it moves
    return optimizer_bytes(run) + copies * sum(4 * parameter.numel() for parameter in trained_parameters(task))


def trained_parameters(task: Task) -> list:
    return [parameter for parameter in task.trained.parameters() if parameter.requires_grad]


def checkpoints(task: Task, run: Run) -> int:
    """How many the whole run keeps."""
    every, limit = run.options.run.checkpointing_steps, run.options.run.checkpoints_total_limit
    made = -(-task.max_steps // every) if every else 1
    return min(made, limit or made)


def result_bytes(task: Task, run: Run, family: Family) -> int:
    """Of the weights that training/result.py leaves: LoRA's, and a pipeline's network, of a UNet unet.pth too."""
    model, parameters = run.options.model, list(task.trained.parameters())
    whole = sum(4 * parameter.numel() for parameter in parameters) * (2 if family.backbone == "unet" else 1)
    if not model.lora_rank:
        return whole
    return sum(4 * parameter.numel() for parameter in trained_parameters(task)) + (whole if model.merge_lora else 0)


def disk(task: Task, run: Run, family: Family) -> str:
    count, one, result = checkpoints(task, run), checkpoint_bytes(task, run), result_bytes(task, run, family)
    others = " and the base's other parts" if not run.options.model.lora_rank or run.options.model.merge_lora else ""
    folder = next(path for path in (run.output_dir.absolute(), *run.output_dir.absolute().parents) if path.is_dir())
    free, needed = shutil.disk_usage(folder).free, count * one + result
    return (f"{count} checkpoint{'s' * (count > 1)} of {size(one)}, the result {size(result)}{others}; {size(free)} are free"
            + (": NOT ENOUGH" if free < needed else ""))


def total_memory(device: torch.device) -> float:
    """GiB of the device, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIB
    import psutil
    return psutil.virtual_memory().total / GIB


# --- advice ------------------------------------------------------------------------------------------------------------

def what_lowers_memory(task: Task, run: Run, family: Family) -> list[str]:
    """The options that would, with what they free where that is known before."""
    options, policy = run.options, getattr(task, "policy", None)
    memory, optimizer, found = options.memory, options.optimizer, []
    if optimizer.train_batch_size > 1:
        batch, accumulated = optimizer.train_batch_size // 2, optimizer.gradient_accumulation_steps * 2
        found.append(f"--train_batch_size {batch} --gradient_accumulation_steps {accumulated} (the same step)")
    if not (memory.gradient_checkpointing or memory.selective_checkpointing or family.always_checkpoints):
        found.append("--gradient_checkpointing (slower by a third)")
    if memory.mixed_precision == "no" and run.device.type == "cuda":
        found.append("--mixed_precision bf16")
    if policy and policy.reference is not None and run.device.type == "cuda" and not memory.offload_reference:
        found.append(f"--offload_reference ({size(nbytes(policy.reference.parameters()))})")
    if optimizer.optimizer == "adamw" and (state := optimizer_bytes(run)):
        found.append(f"--use_8bit_adam ({size(0.75 * state)})")
    if not options.data.cached_dataset and options.objective.train_method != "spo":
        found.append("--cached_dataset (no VAE, no text encoders: scripts/prepare/cache.sh)")
    if not options.model.lora_rank:
        found.append("--lora_rank 16 (no moments of the whole network)")
    elif memory.quantize_base == "none":
        found.append("--quantize_base int8 or nf4 (half or a quarter of the frozen base)")
    return found


def what_lowers_time(task: Task, run: Run) -> list[str]:
    options, found = run.options, []
    pairs, devices = len(getattr(task, "dataset", ())), run.accelerator.num_processes * options.optimizer.train_batch_size
    passes = task.max_steps * run.pairs_per_step / pairs if pairs else 0
    if passes > MANY_PASSES:
        micro_steps = max(1, pairs // 8 // devices)
        steps = max(1, 10 * pairs // (micro_steps * devices))
        found.append(f"--gradient_accumulation_steps {micro_steps} --max_train_steps {steps} "
                     f"(10 passes over the {pairs} pairs; these are {passes:.0f})")
    cuda = run.device.type == "cuda"
    if cuda and options.memory.mixed_precision == "no":
        found.append("--mixed_precision bf16")
    if cuda and not options.memory.compile:
        found.append("--compile")
    if not options.data.cached_dataset and options.objective.train_method != "spo":
        found.append("--cached_dataset" + ("" if options.data.dataloader_num_workers else " or --dataloader_num_workers 4"))
    if options.memory.gradient_checkpointing:
        found.append("no --gradient_checkpointing, where memory allows it")
    return found


def what_lowers_disk(task: Task, run: Run) -> list[str]:
    return ["--checkpoints_total_limit 2"] if task.max_steps and checkpoints(task, run) > 2 else []
