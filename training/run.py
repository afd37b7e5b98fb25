"""What the runs of all methods share: devices and trackers, the output folder's owner, the seed; and how they step."""

import math
import os
import secrets
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (AutocastKwargs, DistributedDataParallelKwargs, FullyShardedDataParallelPlugin,
                              InitProcessGroupKwargs, ProjectConfiguration, set_seed)
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from training.options import TrainArguments
from training.checkpoints import claim_output_dir
from common.errors import UserError, first_line
from training.optimizers import clips_gradients

COMPUTE_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def start_accelerator(args: TrainArguments, process_timeout: float = 1800.0) -> Accelerator:
    """Devices, mixed precision and trackers, or one line that says what this machine lacks.

    process_timeout: seconds that a process waits for the others in a collective before the run ends.
    """
    project = ProjectConfiguration(project_dir=args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir)))
    fsdp = None
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        # Parameters stay float32 and the forward pass runs under autocast, as without sharding: so the reference is exact.
        fsdp = FullyShardedDataParallelPlugin(mixed_precision_policy=MixedPrecisionPolicy())
    several_on_cpu = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available()
    try:
        accelerator = Accelerator(
            fsdp_plugin=fsdp,
            cpu=several_on_cpu,  # else accelerate leaves each process on its own
            mixed_precision=args.mixed_precision, gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=None if args.report_to == "none" else args.report_to, project_config=project,
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                             # A UNet uses each weight once a pass: the cache would only hold bf16 copies of all of them.
                             AutocastKwargs(cache_enabled=False),
                             InitProcessGroupKwargs(timeout=timedelta(seconds=process_timeout))])
    except (ValueError, ImportError) as error:
        raise UserError(f"accelerate cannot start with --mixed_precision {args.mixed_precision} --report_to "
                        f"{args.report_to}: {first_line(error)}") from None
    if args.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("fp16 needs a GPU, and this runs on the CPU: use --mixed_precision bf16 or no")
    if args.mixed_precision == "bf16" and accelerator.device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise UserError("this GPU has no bf16: use --mixed_precision fp16")
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return accelerator


def identify_run(args: TrainArguments, accelerator: Accelerator) -> None:
    """Claim output_dir for this run and settle its seed, the same on every device. Raises UserError."""
    claim_output_dir(args, accelerator)
    if args.seed is None:
        drawn = torch.tensor([secrets.randbelow(2**31)], device=accelerator.device)
        args.seed = int(accelerator.reduce(drawn if accelerator.is_main_process else torch.zeros_like(drawn),
                                           reduction="sum"))
    set_seed(args.seed)


def gradient_norm(accelerator: Accelerator, policy, args: TrainArguments):
    """The norm before clipping, as a tensor on the device; the gradients are clipped where the published rule says."""
    max_norm = args.max_grad_norm if clips_gradients(args) else math.inf
    norm = accelerator.clip_grad_norm_(policy.parameters(), max_norm)
    if norm is None:  # DeepSpeed clips by itself
        return 0.0
    return norm.full_tensor() if isinstance(norm, DTensor) else norm  # FSDP2's parameters are sharded, and so is this


def take_step(accelerator: Accelerator, optimizer, lr_scheduler, finite: bool) -> None:
    """One step of optimizer and schedule; without a finite loss and gradient none, and both stay as they are."""
    if finite:
        optimizer.step()
        if not accelerator.optimizer_step_was_skipped:  # fp16: the gradient overflowed, and the scaler has adapted
            lr_scheduler.step()
    elif accelerator.scaler is not None:
        accelerator.scaler.update()  # it has seen these gradients, and is told that they are gone
    optimizer.zero_grad(set_to_none=True)


def tracker_config(args: TrainArguments) -> dict:
    return {name: value if isinstance(value, (int, float, str, bool)) else str(value) for name, value in vars(args).items()}
