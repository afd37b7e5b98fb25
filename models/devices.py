"""Devices and precision of a program, and what its processes do together."""

import os
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import (AutocastKwargs, DistributedDataParallelKwargs, DistributedType, FullyShardedDataParallelPlugin,
                              InitProcessGroupKwargs, ProjectConfiguration, gather_object)
from safetensors import SafetensorError
from torch.distributed.fsdp import MixedPrecisionPolicy

from common.errors import UserError, first_line, write_fault
from common.train_options import TrainOptions
from models.family import Family

COMPUTE_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def start_accelerator(options: TrainOptions) -> Accelerator:
    """Devices, mixed precision and trackers. Raises UserError for what this machine lacks."""
    diffusers.utils.logging.disable_progress_bar()  # ours is the run's
    transformers.utils.logging.disable_progress_bar()
    memory, tracker = options.memory, options.run.report_to
    project = ProjectConfiguration(project_dir=options.run.output_dir,
                                   logging_dir=str(Path(options.run.output_dir, options.run.logging_dir)))
    fsdp = None
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        # Parameters stay float32 and the forward pass runs under autocast, as without sharding: so the reference is exact.
        fsdp = FullyShardedDataParallelPlugin(mixed_precision_policy=MixedPrecisionPolicy())
    several_on_cpu = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available()
    try:
        accelerator = Accelerator(
            fsdp_plugin=fsdp,
            cpu=several_on_cpu,  # else accelerate leaves each process on its own
            mixed_precision=memory.mixed_precision,
            gradient_accumulation_steps=options.optimizer.gradient_accumulation_steps,
            log_with=None if tracker == "none" else tracker, project_config=project,
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                             # Each weight is used once a pass: the cache would only hold bf16 copies of all of them.
                             AutocastKwargs(cache_enabled=False),
                             InitProcessGroupKwargs(timeout=timedelta(seconds=options.run.process_timeout))])
    except (ValueError, ImportError) as error:
        raise UserError(f"accelerate cannot start with --mixed_precision {memory.mixed_precision} --report_to {tracker}: "
                        f"{first_line(error)}") from None
    if memory.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("fp16 needs a GPU, and this runs on the CPU: use --mixed_precision bf16 or no")
    if memory.mixed_precision == "bf16" and accelerator.device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise UserError("this GPU has no bf16: use --mixed_precision fp16")
    if memory.quantize_base != "none" and sharded(accelerator):
        raise UserError(f"--quantize_base {memory.quantize_base} is for one GPU or one copy a GPU (DDP), and its weights "
                        "are not sharded: leave FSDP and DeepSpeed, or drop it")
    if memory.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return accelerator


def settle_precision(options: TrainOptions, family: Family) -> None:
    """bf16 by default for flow matching, whose bases were trained in it; fp16 refused where it overflows."""
    if family.flow and "mixed_precision" not in options.given:
        options.memory.mixed_precision = "bf16"
    if options.memory.mixed_precision == "fp16" and family.overflows_in_fp16:
        raise UserError(f"{family.label} overflows in fp16: use --mixed_precision bf16")


def sharded(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def shard_by(accelerator: Accelerator, blocks: tuple[type, ...]) -> None:
    """FSDP wraps these blocks, one by one. DeepSpeed partitions by itself."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        plugin.transformer_cls_names_to_wrap = [block.__name__ for block in blocks]


@contextmanager
def raising_together():
    """A UserError of one process is raised on all at the block's end, so that none waits for it. Every process must enter
    it."""
    problem = None
    try:
        yield
    except UserError as error:
        problem = str(error)
    problems = [problem for problem in gather_object([problem]) if problem]
    if problems:
        raise UserError(problems[0])


def agree(flag: bool) -> bool:
    """Whether it is set on any process. Every process must call this."""
    return any(gather_object([flag]))


@contextmanager
def writing(what: str, folder: Path, flag: str = "--output_dir"):
    """Where a process cannot write, all raise UserError at the block's end. Collectives inside are for sharded runs."""
    with raising_together():
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            raise UserError(f"cannot write {what}: {write_fault(error, folder)}. What was saved before it is intact: make "
                            f"room, or name another {flag}, then run the same command again") from None
