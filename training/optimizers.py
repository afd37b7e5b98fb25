"""The optimizer and learning-rate schedule of a run."""

import importlib

import torch
from diffusers.optimization import SchedulerType, get_scheduler
from transformers.optimization import Adafactor

from training.options import TrainArguments
from common.errors import UserError


def effective_learning_rate(args: TrainArguments, num_processes: int) -> float:
    """The peak rate: with --scale_lr multiplied by devices * batch * accumulation, the pairs of an optimizer step."""
    if not args.scale_lr:
        return args.learning_rate
    return args.learning_rate * num_processes * args.train_batch_size * args.gradient_accumulation_steps


def optimizer_name(args: TrainArguments) -> str:
    """The published rule where --optimizer is auto: Adafactor for SDXL or where it is asked for, else AdamW."""
    if args.optimizer != "auto":
        return args.optimizer
    if args.use_8bit_adam:
        return "adamw8bit"
    return "adafactor" if args.use_adafactor or args.sdxl else "adamw"


def clips_gradients(args: TrainArguments) -> bool:
    """An explicit --use_adafactor turns clipping off, SDXL's own Adafactor keeps it (as the published runs did)."""
    return not args.use_adafactor


def make_optimizer(parameters: list, args: TrainArguments, lr: float) -> torch.optim.Optimizer:
    name = optimizer_name(args)
    if name == "adafactor":
        return Adafactor(parameters, lr=lr, weight_decay=args.adam_weight_decay, clip_threshold=1.0,
                         scale_parameter=False, relative_step=False)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr)
    settings = {"lr": lr, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon,
                "weight_decay": args.adam_weight_decay}
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


def make_schedule(optimizer: torch.optim.Optimizer, args: TrainArguments, max_steps: int):
    """A schedule that steps once an optimizer step, whatever the number of processes. Raises UserError."""
    try:
        if args.lr_scheduler == "piecewise_constant":
            raise ValueError("its rules have no option here")
        return get_scheduler(args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps,
                             num_training_steps=max_steps)
    except ValueError:
        raise UserError(f"--lr_scheduler {args.lr_scheduler} is none of "
                        f"{', '.join(kind.value for kind in SchedulerType if kind.value != 'piecewise_constant')}") from None
