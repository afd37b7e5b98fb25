"""The optimizer and learning-rate schedule of a run, and its step."""

import importlib
import math

import torch
from accelerate import Accelerator
from diffusers.optimization import SchedulerType, get_scheduler
from torch.distributed.tensor import DTensor
from transformers.optimization import Adafactor

from common.train_options import OptimizerOptions
from common.errors import UserError, first_line, warn

NOTICEABLE = 1e-3  # of a typical weight
WARMUP_THEN_DECAY = "warmup_then_decay"  # a schedule beside those of diffusers


def effective_learning_rate(options: OptimizerOptions, num_processes: int) -> float:
    """The peak rate: with --scale_lr multiplied by devices * batch * accumulation, the pairs of an optimizer step."""
    if not options.scale_lr:
        return options.learning_rate
    return options.learning_rate * num_processes * options.train_batch_size * options.gradient_accumulation_steps


def make_optimizer(parameters: list, options: OptimizerOptions, lr: float) -> torch.optim.Optimizer:
    name = options.optimizer
    if name == "adafactor":
        return Adafactor(parameters, lr=lr, weight_decay=options.adam_weight_decay, clip_threshold=1.0,
                         scale_parameter=False, relative_step=False)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr)
    settings = {"lr": lr, "betas": (options.adam_beta1, options.adam_beta2), "eps": options.adam_epsilon,
                "weight_decay": options.adam_weight_decay}
    if name == "adamw8bit":
        return adamw_8bit()(parameters, **settings)
    # One kernel for all parameters; on the CPU it rounds differently and gains nothing.
    return torch.optim.AdamW(parameters, **settings, fused=parameters[0].is_cuda)


def adamw_8bit() -> type[torch.optim.Optimizer]:
    """AdamW whose two moments take a byte each: bitsandbytes' where it is installed, else torchao's. UserError."""
    for library in ("bitsandbytes.optim", "torchao.optim"):
        try:
            return importlib.import_module(library).AdamW8bit
        except (ImportError, AttributeError, OSError, RuntimeError):  # not here, or built for another machine
            continue
    raise UserError("8-bit AdamW needs bitsandbytes or torchao, and neither can be used here: pip install bitsandbytes, "
                    "or choose --optimizer adamw")


def warn_of_tiny_rate(parameters: list, name: str, lr: float, steps: int) -> None:
    """Warn of a rate at which the whole run would leave the weights where they are. Adam and Adafactor move a weight by
    about the rate per step, whatever its gradient."""
    if name == "sgd" or not steps:
        return
    largest = max(parameters, key=lambda parameter: parameter.numel())
    typical = float(largest.detach().abs().mean())
    if lr * steps < NOTICEABLE * typical:
        warn(f"a learning rate of {lr:.3g} over {steps} steps moves a weight by {lr * steps:.1g} at most, where weights are "
             f"about {typical:.1g}: nothing will be learned. Raise --learning_rate, or take more steps")


def make_schedule(optimizer: torch.optim.Optimizer, options: OptimizerOptions, max_steps: int):
    """A schedule that steps once an optimizer step, whatever the number of processes. Raises UserError."""
    if options.lr_scheduler == WARMUP_THEN_DECAY:
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_then_decay(step, options.lr_warmup_steps, max_steps))
    known = [kind.value for kind in SchedulerType if kind.value != "piecewise_constant"]  # its rules have no option here
    if options.lr_scheduler not in known:
        raise UserError(f"--lr_scheduler {options.lr_scheduler} is none of {', '.join(known)}, {WARMUP_THEN_DECAY}")
    try:
        return get_scheduler(options.lr_scheduler, optimizer, num_warmup_steps=options.lr_warmup_steps,
                             num_training_steps=max_steps)
    except ValueError as error:  # polynomial decays to 1e-7, which a published rate may be below
        raise UserError(f"--lr_scheduler {options.lr_scheduler} cannot be used here ({first_line(error)}): choose another, "
                        "or another --learning_rate") from None


def warmup_then_decay(step: int, warmup_steps: int, max_steps: int) -> float:
    """Share of the peak rate after `step` optimizer steps: logarithmic warm-up, then linear to 0. DeepSpeed's
    WarmupDecayLR, whose warm-up is logarithmic by default, which SPO's official program keeps."""
    if step < warmup_steps:
        return math.log(step + 1) / math.log(max(2, warmup_steps))
    return max(0, max_steps - step) / max(1, max_steps - warmup_steps)


def gradient_norm(accelerator: Accelerator, model, options: OptimizerOptions):
    """The norm before clipping, as a tensor on the device; the gradients are clipped where the published rule says: an
    explicit --use_adafactor turns clipping off, SDXL's own Adafactor keeps it."""
    norm = accelerator.clip_grad_norm_(model.parameters(), math.inf if options.use_adafactor else options.max_grad_norm)
    if norm is None:  # DeepSpeed clips by itself
        return 0.0
    return norm.full_tensor() if isinstance(norm, DTensor) else norm  # FSDP2's parameters are sharded, and so is this


def take_step(accelerator: Accelerator, optimizer, schedule, finite: bool) -> None:
    """One step of optimizer and schedule; without a finite loss and gradient none, and both stay as they are."""
    if finite:
        optimizer.step()
        if not accelerator.optimizer_step_was_skipped:  # fp16: the gradient overflowed, and the scaler has adapted
            schedule.step()
    elif accelerator.scaler is not None:
        accelerator.scaler.update()  # it has seen these gradients, which are gone now
    optimizer.zero_grad(set_to_none=True)
